"""Answers of a fake machine's agent, and how it reads requests."""

from collections.abc import AsyncIterator, Mapping
from typing import TypeVar

import msgspec

from fusevm.model.errors import BadRequest

T = TypeVar("T")
#: As the agent's language reads them (strconv.ParseBool).
_TRUE, _FALSE = ({"1", "t", "T", "TRUE", "true", "True"}, {"0", "f", "F", "FALSE", "false", "False"})


class FakeAnswer(msgspec.Struct, frozen=True):
    """What a route answers. `chunks` instead of `body`: as it comes."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = {}
    chunks: AsyncIterator[bytes] | None = None


def render(status: int, value: object) -> FakeAnswer:
    """A record as JSON."""
    return FakeAnswer(status, msgspec.json.encode(value))


def decode(body: bytes, kind: type[T]) -> T:
    """The record of a body; an empty body is an empty object. Raises BadRequest."""
    try:
        decoded: T = msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.MsgspecError as error:
        raise BadRequest(field=str(error)) from error
    return decoded


def flag(query: Mapping[str, str], name: str, *, otherwise: bool) -> bool:
    """A boolean query parameter. Raises BadRequest."""
    text = query.get(name, "")
    if text and text not in _TRUE | _FALSE:
        raise BadRequest(field=name)
    return text in _TRUE if text else otherwise


def whole_number(query: Mapping[str, str], name: str, otherwise: int, *, most: int) -> int:
    """A number from 0 on of the query. Raises BadRequest."""
    text = query.get(name, "")
    if not text:
        return otherwise
    if not text.isascii() or not text.isdecimal() or len(text) > len(str(most)) or int(text) > most:
        raise BadRequest(field=name)
    return int(text)
