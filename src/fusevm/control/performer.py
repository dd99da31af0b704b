"""Carries out one action against a host and its guest, and returns what came of it as an event.

Every order is valid until the moment in which its action is given up, so that none is carried out after that
(docs/decisions/0016-deadlines-of-orders.md).

Errors of the host and the guest are raised; the worker turns them into events (`outcome.error_outcome`).
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar, assert_never

import structlog

from fusevm.control import delivery
from fusevm.control.entry import Entry
from fusevm.control.guest_calls import GuestCalls
from fusevm.control.host_api import HostApi
from fusevm.control.outcome import boot_outcome, fence_of, machine_order
from fusevm.control.vault import Vault, redactor_of
from fusevm.core.redaction import Redactor
from fusevm.model.environment import (
    Action,
    BootMachine,
    ChangeNetwork,
    DestroyMachine,
    DrainAgent,
    Environment,
    RestoreMachine,
    RotateToken,
    SetUpMachine,
    SnapshotMachine,
    TimedAction,
)
from fusevm.model.errors import Error, HostNotFound, Timeout
from fusevm.model.event import (
    AgentDrained,
    DestroyConfirmed,
    Event,
    HostLost,
    NetworkChanged,
    OutputSeen,
    SetUpSucceeded,
    SnapshotRestored,
    SnapshotTaken,
    TokenRotated,
)
from fusevm.model.machine import Fence
from fusevm.model.setup import Setup
from fusevm.model.snapshot import SnapshotKind
from fusevm.wire.host_snapshots import TakeSnapshot

T = TypeVar("T")
_Inside = SetUpMachine | DrainAgent | RotateToken | RestoreMachine
log = structlog.get_logger()

#: Seconds that one destroy may take at the host, and is valid.
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
    ChangeNetwork: "change_network",
    SnapshotMachine: "snapshot",
    RestoreMachine: "restore",
    DestroyMachine: "destroy",
}


def operation_name(action: Action) -> str:
    """The action as metrics and their readers call it."""
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
        database_ms: Callable[[], Awaitable[int]],
    ) -> None:
        """`database_ms` reads the time by which actions are given up."""
        self._host_of = host_of
        self._vault = vault
        self._entry = entry
        self._cluster = cluster
        self._database_ms = database_ms

    async def perform(self, record: Environment, action: Action) -> Event:
        """Do it, within its deadline. Raises Error."""
        try:
            host = await self._host_of(action.host_id)
        except HostNotFound:
            # Nobody watches a host that is not registered, and nobody will ever confirm: what ran there is given up.
            log.warning("host_is_gone", uid=record.uid, host=action.host_id)
            return HostLost(cause=_cause(action), host_id=action.host_id)
        # The host's clock first: if this process stands still in between, the order ends sooner, never later.
        reading = await host.read_clock()
        asked_s = asyncio.get_running_loop().time()
        left_s = await self._left_s(action)
        fence = fence_of(self._cluster, record, reading.at(asked_s + left_s))
        if isinstance(action, DestroyMachine):
            await _within(left_s, "the destroy", host.destroy(fence, action.machine_id))
            return DestroyConfirmed(cause=_cause(action), seq=action.seq)
        call = self._timed(host, fence, record, action, max(LEAST_S, left_s))
        return await _within(max(LEAST_S, left_s) + GRACE_S, f"the {operation_name(action)}", call)

    async def _left_s(self, action: Action) -> float:
        """How long it is, from this question on, until the action is given up."""
        if isinstance(action, DestroyMachine):
            return DESTROY_TIMEOUT_S
        return (action.deadline_ms - await self._database_ms()) / 1000

    async def _timed(
        self, host: HostApi, fence: Fence, record: Environment, action: TimedAction, left_s: float
    ) -> Event:
        began = time.perf_counter()
        cause, seq = _cause(action), action.seq
        match action:
            case BootMachine():
                machine = await host.create(fence, machine_order(record, action, left_s))
                return boot_outcome(action, machine, _since(began), host.address)
            case ChangeNetwork():
                await host.set_network(fence, action.machine_id, action.network)
                return NetworkChanged(cause=cause, seq=seq)
            case SnapshotMachine():
                order = TakeSnapshot(snapshot_id=action.snapshot.id, live=action.snapshot.kind is SnapshotKind.LIVE)
                taken = await host.take_snapshot(fence, action.machine_id, order)
                return SnapshotTaken(cause=cause, seq=seq, size_bytes=taken.size_bytes, digest=taken.digest)
            case SetUpMachine() | DrainAgent() | RotateToken() | RestoreMachine():
                setup = await self._vault.load(record.uid) if record.duties.setup else Setup()
                redactor = await redactor_of(setup)
                with _masked(redactor):
                    return await self._inside(host, fence, record, action, setup, redactor, left_s)
            case _:  # pragma: no cover
                assert_never(action)

    async def _inside(
        self,
        host: HostApi,
        fence: Fence,
        record: Environment,
        action: _Inside,
        setup: Setup,
        redactor: Redactor,
        left_s: float,
    ) -> Event:
        """What is done in the guest, with the setup. What it says goes to people without secrets."""
        began = time.perf_counter()
        guest = GuestCalls(host, fence, action.machine_id)
        cause, seq = _cause(action), action.seq
        match action:
            case SetUpMachine():
                await delivery.deliver(guest, record, setup, redactor, self._teller(record, cause))
                return SetUpSucceeded(cause=cause, seq=seq, setup_ms=_since(began))
            case DrainAgent():
                answer = await delivery.drain(guest, left_s)
                message = redactor.text(answer.message)
                return AgentDrained(cause=cause, seq=seq, exit_code=answer.exit_code, message=message)
            case RotateToken():
                await delivery.deliver_again(guest, record, setup)
                return TokenRotated(cause=cause, seq=seq)
            case RestoreMachine():
                await host.restore_snapshot(fence, action.machine_id, action.snapshot.id)
                if record.duties.setup:
                    await delivery.deliver_again(guest, record, setup)
                return SnapshotRestored(cause=cause, seq=seq)
            case _:  # pragma: no cover
                assert_never(action)

    def _teller(self, record: Environment, cause: str) -> delivery.Tell:
        async def tell(stream: str, offset: int, end: int, text: str) -> int:
            event = OutputSeen(cause=cause, stream=stream, offset=offset, end=end, text=text)
            after = await self._entry.feed(record.uid, event)
            return after.startup_told.get(stream, 0)

        return tell


@contextlib.contextmanager
def _masked(redactor: Redactor) -> Iterator[None]:
    """Errors leave the block without secrets."""
    try:
        yield
    except Error as error:
        details = {name: redactor.text(value) for name, value in error.details.items()}
        # Not chained: the original would be shown with it.
        raise type(error).rebuild(redactor.text(error.message), details) from None


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
