"""Asks guests how the user's daemon and the health check are, and feeds what changed to the lifecycle."""

import asyncio
from collections.abc import Sequence

import structlog

from fusevm.control import delivery
from fusevm.control.entry import Entry
from fusevm.control.guest_calls import GuestCalls
from fusevm.control.host_api import HostApi
from fusevm.control.outcome import fence_of
from fusevm.model.environment import Environment, State
from fusevm.model.errors import Error
from fusevm.model.event import AgentSeen, HealthSeen
from fusevm.wire.guest import GuestState

log = structlog.get_logger()
#: Guests asked at the same time per host, and seconds that each may take.
AT_ONCE = 16
LOOK_TIMEOUT_S = 5.0
_TRACKED = frozenset({State.RUNNING, State.DRAINING})


async def track(host: HostApi, entry: Entry, cluster: str, environments: Sequence[Environment]) -> None:
    """Look at every environment that has something to track. A guest that does not answer is asked the next time."""
    slots = asyncio.Semaphore(AT_ONCE)
    async with asyncio.TaskGroup() as group:
        for env in environments:
            if env.state in _TRACKED and (env.duties.agent or env.duties.healthcheck):
                group.create_task(_track(host, entry, cluster, env, slots))


async def _track(host: HostApi, entry: Entry, cluster: str, env: Environment, slots: asyncio.Semaphore) -> None:
    guest = GuestCalls(host, fence_of(cluster, env), env.machine_id)
    async with slots:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                state = await delivery.look(guest)
            await _tell(entry, env, state)
        except TimeoutError:
            log.info("guest_silent", uid=env.uid, problem=f"no answer within {LOOK_TIMEOUT_S:.0f} s")
        except Error as error:
            log.info("guest_silent", uid=env.uid, reason=error.reason, problem=error.message)


async def _tell(entry: Entry, env: Environment, state: GuestState) -> None:
    cause = f"guest {env.machine_id}"
    if state.agent is not None and state.agent != env.agent:
        await entry.feed(env.uid, AgentSeen(cause=cause, status=state.agent))
    if state.health is not None and state.health != env.health:
        await entry.feed(env.uid, HealthSeen(cause=cause, status=state.health))
