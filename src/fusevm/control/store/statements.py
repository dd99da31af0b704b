"""Transactions without a database: a transaction is a generator that yields statements and is sent their rows.

So one logic serves every database: SQLite drives it within a savepoint of its writer thread, PostgreSQL by awaiting
each statement, the cluster simulation on its event loop. A transaction that raises is undone by whoever drives it.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Row = Sequence[Any]


class Statement(NamedTuple):
    """A named query with its values for $1, $2 ..., or, without a name, the text in `tail`."""

    name: str
    values: tuple[object, ...] = ()
    #: Appended to the query: conditions that only some calls have.
    tail: str = ""


Transaction = Generator[Statement, Sequence[Row], T]
#: A transaction may have to be begun again: a generator runs only once.
Begin = Callable[[], Transaction[T]]


def rows(name: str, *values: object) -> Transaction[Sequence[Row]]:
    """All rows of a named query."""
    return (yield Statement(name, values))


def one(name: str, *values: object, tail: str = "") -> Transaction[Row | None]:
    """First row of a query, or None."""
    found = yield Statement(name, values, tail)
    return found[0] if found else None


class Conditions:
    """`and ...` behind a query, only for the filters that were given, so that each has its index."""

    def __init__(self) -> None:
        self._text = ""
        self._values: list[object] = []

    def add(self, condition: str, value: object) -> None:
        """`condition` ends where the value belongs."""
        self._values.append(value)
        self._text += f" {condition} ${len(self._values)}"

    def given(self, **columns: object) -> None:
        """Equality for each value that is not empty; the names are columns."""
        for column, value in columns.items():
            if value:
                self.add(f"and {column} =", value)

    def statement(self, name: str) -> Statement:
        """The query with these conditions."""
        return Statement(name, tuple(self._values), self._text)
