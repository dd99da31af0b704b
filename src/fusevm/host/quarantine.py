"""What cannot be carried out with one machine now: how often it was tried, and when it will be tried again.

A machine in quarantine keeps its record, its numbers and whatever still exists of it; all others go on without it.
An order for it is another try, at once: what is open is finished or undone before the order is carried out, and where
that fails again the order fails with the reason. It is not kept: a daemon that starts begins with a first try at once.

Owns: the count and the pause. Must not: try.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

#: The pause doubles from the first figure to the second, in seconds.
FIRST_S, LONGEST_S = 1.0, 30.0
#: Characters; a boot that fails may bring a whole console.
LONGEST_TEXT = 500


class Quarantine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine of which something is open that has failed."""

    since_ms: int
    #: Tries that have failed so far.
    attempts: int
    #: Of the last one.
    problem: str
    #: None: nothing is tried again by itself.
    retry_at_ms: int | None


class WallClock(Protocol):
    """What is told to people."""

    def now_ms(self) -> int: ...


class BackOff:
    """The tries of one machine."""

    def __init__(self, clock: WallClock) -> None:
        self._clock = clock
        self._pause_s = FIRST_S
        #: None while all is well.
        self.state: Quarantine | None = None

    def fail(self, problem: str) -> float:
        """A try has failed; return the seconds until the next one."""
        pause_s, self._pause_s = self._pause_s, min(LONGEST_S, 2 * self._pause_s)
        self._note(problem, self._clock.now_ms() + round(pause_s * 1000))
        return pause_s

    def give_up(self, problem: str) -> None:
        """Nothing will be tried until somebody orders it."""
        self._note(problem, None)

    def succeed(self) -> None:
        """All is well."""
        self.state, self._pause_s = None, FIRST_S

    def _note(self, problem: str, retry_at_ms: int | None) -> None:
        since_ms, attempts = self._clock.now_ms(), 1
        if self.state is not None:
            since_ms, attempts = self.state.since_ms, self.state.attempts + 1
        text = problem[:LONGEST_TEXT]
        self.state = Quarantine(since_ms=since_ms, attempts=attempts, problem=text, retry_at_ms=retry_at_ms)
