"""Agent profiles: tables `[agents.<name>]` of the settings file. A create names one, or brings its own.

[agents.worker]
download_url = "https://example.com/worker"
sha256 = "..."
command = ["/fuse/agent", "--verbose"]
port = 7000
files."/etc/worker.toml" = { content = "colour = 'blue'", mode = "0600" }
"""

import base64
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fusevm.model.errors import BadSetting
from fusevm.model.setup import AgentSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def parse_profiles(tables: object, file: Path) -> dict[str, AgentSpec]:
    """Name to profile. Raises BadSetting for what nobody would read."""
    if not isinstance(tables, dict):
        raise BadSetting(setting=f"agents in {file}", problem="write tables [agents.<name>]")
    return {name: _parse(table, f"agents.{name} in {file}", name) for name, table in tables.items()}


def _parse(table: object, source: str, name: str) -> AgentSpec:
    if not _NAME.fullmatch(name):
        problem = "a name is 1 to 63 letters, digits, '.', '_' and '-', starting with a letter or digit"
        raise BadSetting(setting=source, problem=problem)
    if not isinstance(table, dict):
        raise BadSetting(setting=source, problem="write a table")
    known = AgentSpec.__struct_fields__
    for field in table:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise BadSetting(setting=source, problem=f"unknown field {field}; {hint}")
    try:
        files = {path: _file(entry) for path, entry in _table("files", table.get("files", {})).items()}
        return msgspec.convert(table | {"files": files}, AgentSpec)
    except (msgspec.ValidationError, ValueError) as error:
        raise BadSetting(setting=source, problem=str(error)) from error


def _file(entry: object) -> dict[str, Any]:
    """Text is written as `content`, bytes as `content_b64`."""
    given = dict(_table("a file has content (or content_b64) and mode; it", entry))
    if isinstance(given.get("content"), str):
        given["content_b64"] = base64.b64encode(given.pop("content").encode()).decode()
    unknown = set(given) - {"content_b64", "mode"}
    if unknown:
        raise ValueError(f"a file has content (or content_b64) and mode, not {', '.join(sorted(unknown))}")
    return given


def _table(what: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a table")  # noqa: TRY004 - of a file, not of our code
    return value
