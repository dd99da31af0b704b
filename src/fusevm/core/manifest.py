"""The manifest of an environment, version 1: JSON of which `workspace` (also as `machine.workspace`) and `env` act.

A value of `env` is a text, `{"value": text}` or `{"secret": name}`. Fields that describe what this system does not do
(`services` and everything unknown) are refused by name unless they are empty: nothing is ignored in silence.
"""

import base64
import binascii
import re
from collections.abc import Mapping

import msgspec

from fusevm.model.errors import BadField, Unimplemented

FIELD = "manifest_inline"
#: What acts and is written where none was given: the contract's.
DEFAULT_WORKSPACE = "/workspace"
DEFAULT = f'{{"version":"1","workspace":"{DEFAULT_WORKSPACE}"}}'
MAX_WORKSPACE = 4_096
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Manifest(msgspec.Struct, frozen=True):
    """What acts, and the text as it was given."""

    text: str
    workspace: str = ""
    env: dict[str, str] = {}


def parse_manifest(encoded: str, secrets: Mapping[str, str]) -> Manifest:
    """Read base64 of a manifest; empty: the default one. Raises BadField, and Unimplemented naming the field."""
    if not encoded:
        return Manifest(DEFAULT, DEFAULT_WORKSPACE)
    text, fields = _decode(encoded)
    machine = _object("machine", fields.pop("machine", None))
    if str(fields.pop("version", None)) != "1":
        raise BadField(field=FIELD, problem='version must be "1"')
    workspace = fields.pop("workspace", None) or machine.pop("workspace", None)
    env = _object("env", fields.pop("env", None))
    _refuse("", fields)
    _refuse("machine.", machine)
    return Manifest(text, _workspace(workspace), {name: _value(name, env[name], secrets) for name in env})


def _decode(encoded: str) -> tuple[str, dict[str, object]]:
    try:
        raw = base64.b64decode(encoded, validate=True)
        return raw.decode(), msgspec.json.decode(raw, type=dict[str, object])
    except (binascii.Error, ValueError) as error:
        # ValueError: not base64, not UTF-8, no JSON, no object
        raise BadField(field=FIELD, problem=f"it is not base64 of a JSON object ({error})") from error


def _object(name: str, value: object) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadField(field=FIELD, problem=f"{name} is no object")
    return dict(value)


def _refuse(prefix: str, fields: Mapping[str, object]) -> None:
    for name, value in fields.items():
        if value not in (None, "", [], {}):
            why = "of a manifest, workspace and env act; start everything else in the startup script or as the daemon"
            raise Unimplemented(feature=f"{FIELD}.{prefix}{name[:80]}", why=why)


def _workspace(value: object) -> str:
    if value is None:
        return ""
    parts = value.split("/") if isinstance(value, str) else []
    if parts[:1] != [""] or {"", ".", ".."} & set(parts[1:]) or len(str(value)) > MAX_WORKSPACE or "\x00" in str(value):
        raise BadField(field=FIELD, problem=f"workspace {str(value)[:80]!r} is no clean absolute path of a directory")
    return str(value)


def _value(name: str, given: object, secrets: Mapping[str, str]) -> str:
    if not _VARIABLE.fullmatch(name):
        raise BadField(field=FIELD, problem=f"env: {name[:80]!r} is no name of a variable")
    match given if isinstance(given, dict) and len(given) == 1 else {"value": given}:
        case {"value": str(value)}:
            found = value
        case {"secret": str(secret)} if secret in secrets:
            found = secrets[secret]
        case {"secret": str(secret)}:
            raise BadField(field="secrets", problem=f"the manifest's env.{name[:80]} needs the secret {secret[:80]!r}")
        case _:
            raise BadField(field=FIELD, problem=f"env.{name[:80]} is neither a text, a value nor a secret")
    if "\x00" in found:
        raise BadField(field=FIELD, problem=f"env.{name[:80]}: a NUL character cannot be passed to a program")
    return found
