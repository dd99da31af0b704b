"""Many streams at one place look once."""

import asyncio

import pytest

from fusevm.control.fanout import Fanout, Page
from fusevm.control.store.protocol import StoredFact
from fusevm.model.environment import State
from fusevm.model.errors import StoreUnreachable
from fusevm.model.fact import Fact, Kind

FACT = StoredFact(
    (1, 1), "t", "", Fact(uid="u", seq=1, kind=Kind.STATE, state=State.RUNNING, at_ms=1, cause="c", message="")
)


class Book:
    """A store whose reads wait until they are let through."""

    def __init__(self) -> None:
        self.facts: list[StoredFact] = []
        self.reads = 0
        self.let_through = asyncio.Event()
        self.problem: Exception | None = None

    async def read(self) -> list[StoredFact]:
        self.reads += 1
        seen = list(self.facts)
        await self.let_through.wait()
        if self.problem is not None:
            raise self.problem
        return seen


def _encode(_fact: StoredFact) -> bytes:
    return b"fact;"


def _looks(fanout: Fanout, book: Book, count: int, place: str = "here") -> list[asyncio.Task[Page]]:
    return [asyncio.create_task(fanout.look(place, book.read, _encode)) for _ in range(count)]


async def _turn() -> None:
    """Let everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_many_looks_at_one_place_are_one_read() -> None:
    fanout, book = Fanout(), Book()
    book.facts = [FACT, FACT]
    looks = [*_looks(fanout, book, 100), *_looks(fanout, book, 1, "elsewhere")]
    await _turn()
    book.let_through.set()
    assert await asyncio.gather(*looks) == [Page([FACT, FACT], b"fact;fact;")] * 101
    assert book.reads == 2


async def test_who_joined_a_look_that_found_nothing_looks_again() -> None:
    fanout, book = Fanout(), Book()
    early = _looks(fanout, book, 1)
    await _turn()
    book.facts = [FACT]
    late = _looks(fanout, book, 10)
    await _turn()
    book.let_through.set()
    assert await asyncio.gather(*early) == [Page([], b"")]
    assert await asyncio.gather(*late) == [Page([FACT], b"fact;")] * 10
    assert book.reads == 2


async def test_a_failed_look_fails_for_all_of_its_waiters_and_for_no_later_one() -> None:
    fanout, book = Fanout(), Book()
    book.problem = StoreUnreachable(problem="away")
    looks = _looks(fanout, book, 3)
    await _turn()
    book.let_through.set()
    for look in looks:
        with pytest.raises(StoreUnreachable):
            await look
    book.problem, book.facts = None, [FACT]
    assert (await fanout.look("here", book.read, _encode)).facts == [FACT]


async def test_a_stream_that_goes_away_takes_nothing_from_the_others() -> None:
    fanout, book = Fanout(), Book()
    book.facts = [FACT]
    first, second = _looks(fanout, book, 2)
    await _turn()
    first.cancel()
    await _turn()
    book.let_through.set()
    assert (await second).facts == [FACT]
    assert first.cancelled()
