"""The one conversion between errors and bytes, in both spellings.

Public API: `{"error": {"code", "message", "details"}}` (the contract's envelope).
Host daemon and guest agent: `{"error": text, "code": ..., "details": {...}}`.
`details.reason` names our class, so the far side raises the same one.
"""

import http

import msgspec

from fusevm.model import errors
from fusevm.model.errors import Error


class EnvelopeError(msgspec.Struct, frozen=True, omit_defaults=True):
    """Inside of the public envelope. `details` values are strings."""

    code: str
    message: str
    details: dict[str, str] = {}


class Envelope(msgspec.Struct, frozen=True):
    """Body of every public answer that is not a success."""

    error: EnvelopeError


class FlatError(msgspec.Struct, frozen=True, omit_defaults=True):
    """Body of every host or agent answer that is not a success."""

    error: str
    code: str = ""
    details: dict[str, str] = {}


_BY_REASON: dict[str, type[Error]] = {cls.reason: cls for cls in errors.error_classes()}
#: For a reason of another version: what the code alone says, a group (`NotFound`) rather than one of its members.
_BY_CODE: dict[tuple[str, int], type[Error]] = {
    (cls.code, cls.status): cls
    for cls in reversed([*errors.Error.__subclasses__(), *errors.error_classes()])
    if cls.code != "internal"
}
_flat = msgspec.json.Decoder(FlatError)
_envelope = msgspec.json.Decoder(Envelope)


def render_envelope(error: Error) -> bytes:
    """The public JSON body of an error."""
    return msgspec.json.encode(Envelope(EnvelopeError(error.code, error.message, error.details)))


def render_flat(error: Error) -> bytes:
    """The JSON body of an error on the host and guest APIs."""
    return msgspec.json.encode(FlatError(error.message, error.code, error.details))


def ending_error(id: str, uid: str, *, state: str, reason: str, message: str) -> Error:  # noqa: A002 - the records' field
    """Why an environment has ended, or begun to: the error that its reason names, with the message of its record;
    EnvironmentEnded where nothing has failed. `record` in the details is where the record is shown."""
    about = {"id": id, "uid": uid, "record": f"/v1/environments/{id}?uid={uid}"}
    cls = _BY_REASON.get(reason)
    if cls is not None:
        return cls.rebuild(message, about)
    cause = ": ".join(part for part in (reason, message) if part)
    ended = errors.EnvironmentEnded(id=id, uid=uid, state=state, cause=cause)
    return errors.EnvironmentEnded.rebuild(ended.message, about | ended.details)


def parse_error(status: int, body: bytes) -> Error:
    """Make the error that the other side raised; an unreadable body becomes an Internal that names the status."""
    for parse in (_parse_flat, _parse_envelope):
        found = parse(body)
        if found is not None:
            return _make(status, *found)
    phrase = http.HTTPStatus(status).phrase if status in http.HTTPStatus._value2member_map_ else "unknown status"
    text = body[:200].decode("utf-8", "replace").strip()
    return _make(status, "", f"status {status} ({phrase})" + (f": {text}" if text else ""), {})


def _parse_flat(body: bytes) -> tuple[str, str, dict[str, str]] | None:
    try:
        flat = _flat.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return flat.code, flat.error, flat.details


def _parse_envelope(body: bytes) -> tuple[str, str, dict[str, str]] | None:
    try:
        inner = _envelope.decode(body).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return inner.code, inner.message, inner.details


def _make(status: int, code: str, message: str, details: dict[str, str]) -> Error:
    cls = _BY_REASON.get(details.get("reason", ""))
    if cls is not None:
        return cls.rebuild(message, details)
    cls = _BY_CODE.get((code, status), errors.Internal)
    return cls.rebuild(message, {"problem": message, **details})
