"""A host that is drained: whatever runs there is drained, also what comes up or becomes free for it later.

The request does it once, and whoever watches the host again with every heartbeat, so that nothing is forgotten.
"""

from typing import Protocol

import structlog

from fusevm.control.entry import Entry
from fusevm.control.store.protocol import Reading
from fusevm.model.environment import Environment, State
from fusevm.model.errors import Error
from fusevm.model.event import DrainRequested

log = structlog.get_logger()


class Placements(Protocol):
    """Who is where."""

    async def on_host(self, host_id: str) -> Reading[Environment]:
        """All live environments of a host."""
        ...


async def drain_environments(store: Placements, entry: Entry, host_id: str, cause: str) -> None:
    """Drain what runs on a host. What is busy with another action, or still being made, is left for the next time."""
    for env in (await store.on_host(host_id)).records:
        if env.state is not State.RUNNING:
            continue
        try:
            await entry.feed(env.uid, DrainRequested(cause=cause), known=env)
        except Error as error:
            log.info("not_drained_yet", host=host_id, uid=env.uid, reason=error.reason)
