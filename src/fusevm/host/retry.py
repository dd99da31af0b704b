"""What is open with one machine, or unknown of it, is looked at again: after a pause, or as soon as somebody orders it.

Only that something is open is kept, never what: whoever looks again reads the journal when his turn comes, since
orders may have finished it meanwhile.

Owns: the timer. Must not: try.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fusevm.host.quarantine import BackOff, Quarantine, WallClock


class Retry:
    """The next look at one machine; `look` is called when its pause is over."""

    def __init__(self, clock: WallClock, look: Callable[[], None]) -> None:
        self._look = look
        self._timer: asyncio.TimerHandle | None = None
        self._back_off = BackOff(clock)
        #: Something is open in the journal, or it is not known how the machine is: that comes before any order.
        self.is_open = False

    @property
    def quarantine(self) -> Quarantine | None:
        """What could not be carried out; None while all is well."""
        return self._back_off.state

    def begin(self) -> None:
        """Somebody is about to look for the first time."""
        self.is_open = True

    def fail(self, problem: str, *, comes_first: bool) -> float:
        """Something could not be finished: look again later. Returns the pause in seconds.

        `comes_first`: it comes before any order (`is_open`).
        """
        self.is_open = comes_first
        pause_s = self._back_off.fail(problem)
        self.cancel()
        self._timer = asyncio.get_running_loop().call_later(pause_s, self._look)
        return pause_s

    def note_crash(self, problem: str) -> float:
        """The task itself failed; return the seconds after which it should begin anew."""
        return self._back_off.fail(problem)

    def give_up(self, problem: str) -> None:
        """Nothing is looked at until somebody orders it."""
        self._back_off.give_up(problem)

    def settle(self) -> None:
        """Nothing is to be finished, and all is known."""
        self.is_open = False
        self.cancel()
        self._back_off.succeed()

    def cancel(self) -> None:
        """Nobody looks again by himself."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
