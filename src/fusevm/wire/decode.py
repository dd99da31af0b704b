"""JSON bodies in: typed, with errors that name the field, and a list of the fields that nobody knows."""

import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from fusevm.model.errors import BadJson

T = TypeVar("T")


@functools.cache
def _type_info(kind: Any) -> msgspec.inspect.Type:
    """Reading a type anew costs a millisecond; there are a few dozen of them."""
    return msgspec.inspect.type_info(kind)


#: What reading JSON that is not ours, or has been on a disk, may raise: no JSON, another shape, no UTF-8, too deep.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode_body(body: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """Decode a body, empty meaning `{}`; return the value and the dotted names of unknown fields. Raises BadJson."""
    form: Any = kind  # a union is no `type`, and is welcome
    try:
        raw = msgspec.json.decode(body or b"{}")
        value = msgspec.convert(raw, kind)
    except UNREADABLE as error:
        raise BadJson(problem=str(error)) from error
    return value, sorted(_unknown(raw, _type_info(form), ""))


def _unknown(raw: Any, info: msgspec.inspect.Type, path: str) -> Iterator[str]:
    match info:
        case msgspec.inspect.UnionType():
            for candidate in info.types:
                yield from _unknown(raw, candidate, path)
        case msgspec.inspect.StructType() if isinstance(raw, dict):
            known = {field.encode_name: field.type for field in info.fields}
            for name, item in raw.items():
                if name in known:
                    yield from _unknown(item, known[name], f"{path}{name}.")
                else:
                    yield path + name
        case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType() if isinstance(raw, list):
            for index, item in enumerate(raw):
                yield from _unknown(item, info.item_type, f"{path}{index}.")
        case msgspec.inspect.DictType() if isinstance(raw, dict):
            for name, item in raw.items():
                yield from _unknown(item, info.value_type, f"{path}{name}.")
        case _:
            pass


def render_warning(text: str) -> str:
    """Value of a `Warning` header: code 299 is a persistent miscellaneous warning (RFC 7234 section 5.5). ASCII."""
    quoted = text.encode("ascii", "backslashreplace").decode().replace("\\", "\\\\").replace('"', '\\"')
    return f'299 - "{"".join(char for char in quoted if char.isprintable())}"'


def describe_unknown(names: list[str]) -> str:
    """The sentence about fields that nobody knows."""
    return "unknown fields ignored: " + ", ".join(names[:20])
