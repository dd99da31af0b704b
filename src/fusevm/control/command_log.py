"""Tells that users' commands have ended: as facts of kind `exec`, off the way of their answers.

What has ended is noted in memory and told once a second: one transaction for all commands of an environment, one
environment after the other. Where commands end faster than that, the first `MOST` of a round are told one by one and
the others as a number. An orderly end of the process tells what is left; a kill loses the last second. What the store
can never take is dropped. Arguments and output are never told.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog

from fusevm.control.entry import Entry
from fusevm.control.host_api import ReplyLost
from fusevm.control.metrics import Metrics
from fusevm.model.environment import Environment
from fusevm.model.errors import EnvironmentNotFound, ShuttingDown, StoreFull, StoreUnreachable, Timeout
from fusevm.model.event import CommandEnd, CommandsEnded
from fusevm.wire.guest import ExecResult, Exit

log = structlog.get_logger()
#: Seconds that ends are collected.
EVERY_S = 1.0
#: Commands of one environment that are told one by one in a round.
MOST = 10
#: Commands of all environments that are kept to be told one by one.
MOST_WAITING = 20_000
#: Seconds for what is left when the process ends.
LAST_S = 5.0
#: Who tells what no single request is the cause of.
_CAUSE = "commands"
EXEC, STREAM, SHELL, PROCESS = "exec", "stream", "shell", "process"
#: Reasons of events: the end is not known; it stands for many.
CUT_OFF, OMITTED = "cut_off", "omitted"
_NAMES = {EXEC: "a command", STREAM: "a streamed command", SHELL: "a terminal", PROCESS: "a background process"}


class CommandLog:
    """What has ended and is not told yet."""

    def __init__(self, entry: Entry, metrics: Metrics) -> None:
        self._entry = entry
        self._metrics = metrics
        self._waiting: dict[str, list[CommandEnd]] = {}
        #: Commands that are only counted.
        self._others: dict[str, int] = {}
        self._count = 0
        self._noted = asyncio.Event()

    # -- noting ---------------------------------------------------------------------------------------------------

    def ended(self, env: Environment, how: str, cause: str, end: Exit | ExecResult) -> None:
        """A command has ended."""
        data = {"how": how, "exit_code": str(end.exit_code), "duration_ms": str(end.duration_ms)}
        message = f"{_NAMES[how]} ended with exit status {end.exit_code}"
        if end.signal:
            data["signal"] = end.signal
            message = f"{_NAMES[how]} was ended by the signal {end.signal}"
        if end.timed_out:
            data["timed_out"] = "true"
            message = f"{_NAMES[how]} was ended at its time limit"
        self._note(env.uid, [CommandEnd(cause=cause, message=message, data=data)])

    def cut_off(self, env: Environment, how: str, cause: str) -> None:
        """A command's client or host was gone before its end."""
        message = f"{_NAMES[how]} was cut off; its end is not known"
        self._note(env.uid, [CommandEnd(cause=cause, reason=CUT_OFF, message=message, data={"how": how})])

    def started(self, env: Environment, cause: str, pid: int) -> None:
        """A background process was started."""
        data = {"how": PROCESS, "pid": str(pid)}
        self._note(env.uid, [CommandEnd(cause=cause, message=f"{_NAMES[PROCESS]} was started", data=data)])

    @contextmanager
    def noting_loss(self, env: Environment, how: str, cause: str) -> Iterator[None]:
        """Within the block a command may be lost sight of."""
        try:
            yield
        except (ReplyLost, Timeout, asyncio.CancelledError):
            self.cut_off(env, how, cause)
            raise

    def _note(self, uid: str, ends: Sequence[CommandEnd], others: int = 0) -> None:
        waiting = self._waiting.setdefault(uid, [])
        room = max(0, min(MOST - len(waiting), MOST_WAITING - self._count))
        waiting += ends[:room]
        self._count += len(ends[:room])
        if others := others + len(ends[room:]):
            self._others[uid] = self._others.get(uid, 0) + others
        self._noted.set()

    # -- telling --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Tell what ends, until cancelled."""
        while True:
            await self._noted.wait()
            await asyncio.sleep(EVERY_S)
            self._noted.clear()
            await self._tell_all()

    async def close(self) -> None:
        """Tell what is left."""
        try:
            async with asyncio.timeout(LAST_S):
                await self._tell_all()
        except TimeoutError:
            log.warning("commands_not_told", count=self._count + sum(self._others.values()))

    async def tell(self, uid: str) -> None:
        """Tell what has ended in one environment. What the store does not take now is told later, maybe twice."""
        ends, others = self._waiting.pop(uid, []), self._others.pop(uid, 0)
        self._count -= len(ends)
        if not (ends or others):
            return
        commands = (*ends, _omitted(others)) if others else tuple(ends)
        try:
            await self._entry.feed(uid, CommandsEnded(cause=_CAUSE, commands=commands))
        except EnvironmentNotFound:
            pass  # ended and purged meanwhile
        except asyncio.CancelledError:
            self._note(uid, ends, others)
            raise
        except (StoreFull, StoreUnreachable, ShuttingDown) as error:  # told with the next round
            self._metrics.loop_failures.labels("commands").inc()
            log.warning("commands_not_saved", uid=uid, problem=error.message)
            self._note(uid, ends, others)
        except Exception:  # loop boundary: another round would end like this one
            self._metrics.loop_failures.labels("commands").inc()
            log.exception("commands_dropped", uid=uid, count=len(ends) + others)

    async def _tell_all(self) -> None:
        for uid in list(self._waiting):
            await self.tell(uid)


def _omitted(count: int) -> CommandEnd:
    message = f"{count} more commands ended"
    return CommandEnd(cause=_CAUSE, reason=OMITTED, message=message, data={"count": str(count)})
