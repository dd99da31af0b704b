"""Lists are decoded row by row: one damaged record must not hide the others. Rows begin with what names the record."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from fusevm.control.store.protocol import Reading
from fusevm.control.store.statements import Row, Transaction

T = TypeVar("T")
A = TypeVar("A")


def decode_each(found: Sequence[Row], decode: Callable[[Row], T]) -> Reading[T]:
    """Each row by itself."""
    records: list[T] = []
    unreadable: set[str] = set()
    for row in found:
        try:
            records.append(decode(row))
        except (msgspec.MsgspecError, UnicodeError):
            unreadable.add(str(row[0]))
    return Reading(tuple(records), frozenset(unreadable))


def read_page(
    ask: Callable[[A, int], Transaction[Sequence[Row]]],
    after: A,
    limit: int,
    *,
    decode: Callable[[Row], T],
    place: Callable[[Row], A],
) -> Transaction[Reading[T]]:
    """At most `limit` records of the rows that `ask` finds behind a place.

    What cannot be read is made up for by what follows: a short page is the last one.
    """
    page: Reading[T] = Reading()
    while True:
        left = limit - len(page.records)
        found = yield from ask(after, left)
        more = decode_each(found, decode)
        page = Reading((*page.records, *more.records), page.unreadable | more.unreadable)
        if not more.unreadable or len(found) < left:
            return page
        after = place(found[-1])
