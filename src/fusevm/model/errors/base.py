"""Every error Fuse can answer with.

One tree. A class states the contract's `code` (which clients compare), our own stable `reason`, the HTTP `status` and
whether a retry can help. Its annotated fields are the keyword arguments of its constructor; the message is built from
them by `template`, and says what to do. The same class crosses guest -> host -> control plane -> SDK (`wire.errors`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, dataclass_transform, get_type_hints

_INTEGER = re.compile(r"-?[0-9]{1,18}")


@dataclass_transform(kw_only_default=True)
class Error(Exception):
    """Base of every error that may reach a user. Not raised itself."""

    code: ClassVar[str] = "internal"
    reason: ClassVar[str] = ""
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    template: ClassVar[str] = ""

    def __init__(self, **fields: Any) -> None:
        names = field_names(type(self))
        if set(fields) != set(names):
            raise TypeError(f"{type(self).__name__} takes exactly {sorted(names)}, got {sorted(fields)}")
        for name, value in fields.items():
            setattr(self, name, value)
        self._unsaid: frozenset[str] = frozenset()
        self._more: dict[str, str] = {}
        super().__init__(self.template.format(**fields))

    @property
    def message(self) -> str:
        """The sentence for the user."""
        return str(self.args[0])

    @property
    def details(self) -> dict[str, str]:
        """Reason and fields as strings, as the contract wants them; of an error from afar, what was said there."""
        names = [name for name in field_names(type(self)) if name not in self._unsaid]
        return {"reason": self.reason, **{name: str(getattr(self, name)) for name in names}, **self._more}

    @classmethod
    def rebuild(cls, message: str, details: Mapping[str, str]) -> Self:
        """Make the error again on the far side of a wire, with the sender's sentence and details; missing fields become
        empty."""
        error, fields = cls.__new__(cls), field_names(cls)
        Exception.__init__(error, message)
        error._unsaid = frozenset(fields) - details.keys()
        error._more = {name: text for name, text in details.items() if name not in fields and name != "reason"}
        for name, kind in fields.items():
            raw = details.get(name, "")
            setattr(error, name, (int(raw) if _INTEGER.fullmatch(raw) else 0) if kind is int else raw)
        return error


def field_names(cls: type[Error]) -> dict[str, type]:
    """The constructor fields of an error class, with their types (`str` or `int`)."""
    hints = get_type_hints(cls)
    return {name: kind for name, kind in hints.items() if kind in (str, int)}


def error_classes(base: type[Error] = Error) -> Iterator[type[Error]]:
    """Every concrete error class: those with a reason."""
    for cls in base.__subclasses__():
        if cls.__dict__.get("reason"):
            yield cls
        yield from error_classes(cls)
