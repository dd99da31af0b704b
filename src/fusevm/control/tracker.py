"""Asks the guests of a host how the user's daemon and the health check are, and feeds what changed to the lifecycle."""

import asyncio
from collections.abc import Sequence

import structlog

from fusevm.control import delivery
from fusevm.control.entry import Entry
from fusevm.control.guest_calls import GuestCalls
from fusevm.control.host_api import HostApi
from fusevm.control.outcome import fence_of
from fusevm.control.vault import Vault
from fusevm.model.environment import Environment, State
from fusevm.model.errors import Error
from fusevm.model.event import AgentSeen, HealthSeen
from fusevm.wire.guest import GuestState

log = structlog.get_logger()
#: Guests asked at the same time per host, and seconds that each may take.
AT_ONCE = 16
LOOK_TIMEOUT_S = 5.0
_TRACKED = frozenset({State.RUNNING, State.DRAINING})


def is_tracked(env: Environment) -> bool:
    """Whether its guest has a daemon or a health check to ask for."""
    return env.state in _TRACKED and (env.duties.agent or env.duties.healthcheck)


class Tracker:
    """Looks at the guests of one host."""

    def __init__(self, entry: Entry, cluster: str, vault: Vault) -> None:
        self._entry = entry
        self._cluster = cluster
        self._vault = vault
        #: Environments whose guests did not answer last time.
        self._silent: set[str] = set()

    async def look(self, host: HostApi, environments: Sequence[Environment]) -> None:
        """Look once at each of these, which are tracked; those that were silent last: the others are not to wait for
        them. A guest that does not answer is asked again the next time."""
        self._silent &= {env.uid for env in environments}
        slots = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for env in sorted(environments, key=lambda env: env.uid in self._silent):
                group.create_task(self._look(host, env, slots))

    async def _look(self, host: HostApi, env: Environment, slots: asyncio.Semaphore) -> None:
        guest = GuestCalls(host, fence_of(self._cluster, env), env.machine_id)
        async with slots:
            try:
                async with asyncio.timeout(LOOK_TIMEOUT_S):
                    state = await delivery.look(guest)
                self._silent.discard(env.uid)
                await self._tell(env, state)
            except TimeoutError:
                self._silent.add(env.uid)
                log.info("guest_silent", uid=env.uid, problem=f"no answer within {LOOK_TIMEOUT_S:.0f} s")
            except Error as error:
                self._silent.add(env.uid)
                log.info("guest_silent", uid=env.uid, reason=error.reason, problem=error.message)

    async def _tell(self, env: Environment, state: GuestState) -> None:
        cause = f"guest {env.machine_id}"
        agent = state.agent if state.agent != env.agent else None
        health = state.health if state.health != env.health else None
        if (agent is not None and agent.message) or (health is not None and health.message):
            redactor = await self._vault.redactor(env)
            agent = redactor.agent(agent) if agent is not None else None
            health = redactor.health(health) if health is not None else None
        if agent is not None and agent != env.agent:
            await self._entry.feed(env.uid, AgentSeen(cause=cause, status=agent))
        if health is not None and health != env.health:
            await self._entry.feed(env.uid, HealthSeen(cause=cause, status=health))
