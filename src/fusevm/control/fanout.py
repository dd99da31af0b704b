"""What many streams ask the store at the same time is asked, and turned into messages, once.

When something happens, every stream that stands at the same place looks for what comes next. Those that ask while such
a look is under way wait for its answer instead of making their own. Whoever joined a look that found nothing looks
again: it may have begun before that for which they were woken.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import NamedTuple

from fusevm.control.store.protocol import StoredFact


class Page(NamedTuple):
    """Facts, and the same as messages of a stream."""

    facts: list[StoredFact]
    messages: bytes


class Fanout:
    """Looks under way, by what they look for. Belongs to one event loop."""

    def __init__(self) -> None:
        self._looks: dict[Hashable, asyncio.Task[Page]] = {}

    async def look(
        self, place: Hashable, read: Callable[[], Awaitable[list[StoredFact]]], encode: Callable[[StoredFact], bytes]
    ) -> Page:
        """What `read` finds now, or a look at the same place that is under way. Raises what `read` raises."""
        under_way = self._looks.get(place)
        if under_way is not None:
            page = await asyncio.shield(under_way)
            if page.facts:
                return page
        # A look that began before ours has ended by now: one that is under way is late enough.
        look = self._looks.get(place)
        if look is None:
            look = asyncio.get_running_loop().create_task(_page(read, encode), name="event-look")
            self._looks[place] = look
            look.add_done_callback(lambda _done: self._looks.pop(place))
        return await asyncio.shield(look)


async def _page(read: Callable[[], Awaitable[list[StoredFact]]], encode: Callable[[StoredFact], bytes]) -> Page:
    facts = await read()
    return Page(facts, b"".join(map(encode, facts)))
