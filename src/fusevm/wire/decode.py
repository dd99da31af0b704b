"""JSON bodies in: typed, with errors that name the field, and a list of the fields that nobody knows."""

from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from fusevm.model.errors import BadJson

T = TypeVar("T")


def decode_body(body: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """Decode a body, empty meaning `{}`; return the value and the dotted names of unknown fields. Raises BadJson."""
    try:
        raw = msgspec.json.decode(body or b"{}")
        value = msgspec.convert(raw, kind)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadJson(problem=str(error)) from error
    return value, sorted(_unknown(raw, kind, ""))


def _unknown(raw: Any, kind: Any, path: str) -> Iterator[str]:
    info = msgspec.inspect.type_info(kind)
    for candidate in info.types if isinstance(info, msgspec.inspect.UnionType) else (info,):
        if isinstance(candidate, msgspec.inspect.StructType) and isinstance(raw, dict):
            yield from _unknown_in_struct(raw, candidate, path)
        if isinstance(candidate, msgspec.inspect.ListType | msgspec.inspect.VarTupleType) and isinstance(raw, list):
            for index, item in enumerate(raw):
                if isinstance(candidate.item_type, msgspec.inspect.StructType):
                    yield from _unknown(item, candidate.item_type.cls, f"{path}{index}.")


def _unknown_in_struct(raw: dict[str, Any], info: msgspec.inspect.StructType, path: str) -> Iterator[str]:
    known = {field.encode_name: field for field in info.fields}
    for name, item in raw.items():
        if name not in known:
            yield path + name
            continue
        nested = known[name].type
        for candidate in nested.types if isinstance(nested, msgspec.inspect.UnionType) else (nested,):
            if isinstance(candidate, msgspec.inspect.StructType) and isinstance(item, dict):
                yield from _unknown_in_struct(item, candidate, f"{path}{name}.")
