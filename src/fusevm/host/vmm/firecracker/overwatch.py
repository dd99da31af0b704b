"""Who notices a VMM that hangs: its process lives, but its API does not answer any more.

Firecracker's handlers take locks, so that it may come to a standstill that no signal and no event tells. A frozen
machine is not asked; a VMM that is merely starved of CPU has as much time as several questions take.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How long a silent VMM is borne: at most `strikes` times the two others."""

    #: Seconds between two questions.
    every_s: float = 10.0
    #: Seconds that an answer may take.
    answer_s: float = 10.0
    #: Questions in a row that may stay without an answer.
    strikes: int = 3

    @property
    def limit_s(self) -> float:
        """When a hung VMM is ended, at the latest."""
        return self.strikes * (self.every_s + self.answer_s)


PATIENCE: Final = Patience()


async def wait_hung(ask: Callable[[], Awaitable[object]], is_paused: Callable[[], bool], patience: Patience) -> None:
    """Ask again and again; return when too many questions in a row were not answered. Cancel it at the VMM's end."""
    missed = 0
    while missed < patience.strikes:
        await asyncio.sleep(patience.every_s)
        if is_paused():
            missed = 0
            continue
        try:
            async with asyncio.timeout(patience.answer_s):
                await ask()
            missed = 0
        except (TimeoutError, OSError):
            # One that was frozen meanwhile could not answer.
            missed = 0 if is_paused() else missed + 1
