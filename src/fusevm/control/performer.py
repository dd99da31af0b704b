"""Carries out one action against a host and its guest, and returns what came of it as an event.

Errors of the host and the guest are raised; the worker turns them into events (`outcome.error_outcome`).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, assert_never

import structlog

from fusevm.control import delivery
from fusevm.control.clock import Clock
from fusevm.control.entry import Entry
from fusevm.control.guest_calls import GuestCalls
from fusevm.control.host_api import HostApi
from fusevm.control.outcome import boot_outcome, fence_of, machine_order
from fusevm.control.vault import Vault
from fusevm.model.environment import (
    Action,
    BootMachine,
    DestroyMachine,
    DrainAgent,
    Environment,
    RestoreMachine,
    RotateToken,
    SetUpMachine,
    SnapshotMachine,
    TimedAction,
)
from fusevm.model.errors import HostNotFound, Timeout
from fusevm.model.event import (
    AgentDrained,
    DestroyConfirmed,
    Event,
    HostLost,
    Reported,
    SetUpSucceeded,
    SnapshotRestored,
    SnapshotTaken,
    TokenRotated,
)
from fusevm.model.fact import Kind
from fusevm.model.snapshot import SnapshotKind
from fusevm.wire.host_api import TakeSnapshot

T = TypeVar("T")
log = structlog.get_logger()

#: Seconds one destroy may take at the host.
DESTROY_TIMEOUT_S = 60.0
#: Seconds beyond an action's own deadline that we wait for the host to say so.
GRACE_S = 5.0
#: A deadline that has passed still gets this long: the outcome decides, not our clock.
LEAST_S = 1.0
_NAMES: dict[type[Action], str] = {
    BootMachine: "boot",
    SetUpMachine: "setup",
    DrainAgent: "drain",
    RotateToken: "rotate_token",
    SnapshotMachine: "snapshot",
    RestoreMachine: "restore",
    DestroyMachine: "destroy",
}


def action_name(action: Action) -> str:
    """The action as metrics and messages call it."""
    return _NAMES[type(action)]


class Performer:
    """Knows how every action is done."""

    def __init__(
        self,
        host_of: Callable[[str], Awaitable[HostApi]],
        vault: Vault,
        entry: Entry,
        *,
        cluster: str,
        clock: Clock,
    ) -> None:
        self._host_of = host_of
        self._vault = vault
        self._entry = entry
        self._cluster = cluster
        self._clock = clock

    async def perform(self, record: Environment, action: Action) -> Event:
        """Do it, within its deadline. Raises Error."""
        try:
            host = await self._host_of(action.host_id)
        except HostNotFound:
            # Nobody watches a host that is not registered, and nobody will ever confirm: what ran there is given up.
            log.warning("host_is_gone", uid=record.uid, host=action.host_id)
            return HostLost(cause=_cause(action), host_id=action.host_id)
        if isinstance(action, DestroyMachine):
            call = host.destroy(fence_of(self._cluster, record), action.machine_id)
            await _within(DESTROY_TIMEOUT_S, "the destroy", call)
            return DestroyConfirmed(cause=_cause(action), seq=action.seq)
        limit_s = max(LEAST_S, (action.deadline_ms - self._clock.now_ms()) / 1000) + GRACE_S
        return await _within(limit_s, f"the {action_name(action)}", self._timed(host, record, action, limit_s))

    async def _timed(self, host: HostApi, record: Environment, action: TimedAction, limit_s: float) -> Event:
        began = time.perf_counter()
        fence = fence_of(self._cluster, record)
        guest = GuestCalls(host, fence, action.machine_id)
        cause, seq = _cause(action), action.seq
        match action:
            case BootMachine():
                machine = await host.create(fence, machine_order(record, action, self._clock.now_ms()))
                return boot_outcome(action, machine, _since(began))
            case SetUpMachine():
                setup = await self._vault.load(record.uid)
                await delivery.deliver(guest, record, setup, self._teller(record, cause))
                return SetUpSucceeded(cause=cause, seq=seq, setup_ms=_since(began))
            case DrainAgent():
                answer = await delivery.drain(guest, limit_s - GRACE_S)
                return AgentDrained(cause=cause, seq=seq, exit_code=answer.exit_code, message=answer.message)
            case RotateToken():
                await delivery.deliver_again(guest, record, await self._vault.load(record.uid))
                return TokenRotated(cause=cause, seq=seq)
            case SnapshotMachine():
                order = TakeSnapshot(snapshot_id=action.snapshot.id, live=action.snapshot.kind is SnapshotKind.LIVE)
                taken = await host.take_snapshot(fence, action.machine_id, order)
                return SnapshotTaken(cause=cause, seq=seq, size_bytes=taken.size_bytes, digest=taken.digest)
            case RestoreMachine():
                await host.restore_snapshot(fence, action.machine_id, action.snapshot.id)
                if record.duties.setup:
                    await delivery.deliver_again(guest, record, await self._vault.load(record.uid))
                return SnapshotRestored(cause=cause, seq=seq)
            case _:  # pragma: no cover
                assert_never(action)

    def _teller(self, record: Environment, cause: str) -> delivery.Tell:
        async def tell(stream: str, offset: int, text: str) -> None:
            data = {"stream": stream, "offset": str(offset)}
            event = Reported(cause=cause, kind=Kind.STARTUP_OUTPUT, message=text, data=data)
            await self._entry.feed(record.uid, event)

        return tell


def _cause(action: Action) -> str:
    return f"action {action.seq}"


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1000


async def _within(limit_s: float, what: str, call: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(limit_s):
            return await call
    except TimeoutError as error:
        raise Timeout(what=what, limit_s=round(limit_s)) from error
