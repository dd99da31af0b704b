"""Frees snapshots that were deleted or have expired: the host first, then the record. A host that does not answer is
asked again when the lease has run out; a host that is gone for good has taken the bytes with it."""

from collections.abc import Awaitable, Callable

import structlog

from fusevm.control.host_api import HostApi
from fusevm.control.metrics import Metrics
from fusevm.control.store.protocol import Claim, Snapshots
from fusevm.model.errors import Error, HostNotFound, SnapshotNotFound

log = structlog.get_logger()


class Collector:
    """Frees one snapshot at a time per call; each is freed by whoever holds its lease."""

    def __init__(
        self,
        store: Snapshots,
        host_of: Callable[[str], Awaitable[HostApi]],
        *,
        cluster: str,
        claim: Claim,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._host_of = host_of
        self._cluster = cluster
        self._claim = claim
        self._metrics = metrics
        self._busy: set[str] = set()

    async def collect(self, id: str) -> bool:  # noqa: A002 - the record's field
        """Free a snapshot that is due. Failures are logged; it stays due. False: to try again at once is of no use."""
        if id in self._busy:
            return True
        self._busy.add(id)
        try:
            await self._collect(id)
        except Error as error:
            log.warning("snapshot_stays", snapshot=id, reason=error.reason, problem=error.message)
        except Exception:  # loop boundary: one snapshot must not stop the others
            self._metrics.loop_failures.labels("collector").inc()
            log.exception("snapshot_not_freed", snapshot=id)
            return False
        finally:
            self._busy.discard(id)
        return True

    async def _collect(self, id: str) -> None:  # noqa: A002
        snapshot = await self._store.acquire_snapshot(id, self._claim)
        if snapshot is None:
            return
        try:
            host = await self._host_of(snapshot.host_id)
            await host.delete_snapshot(self._cluster, id)
        except (HostNotFound, SnapshotNotFound) as error:
            log.info("snapshot_bytes_are_gone", snapshot=id, reason=error.reason)
        await self._store.drop_snapshot(id)
        log.info("snapshot_freed", snapshot=id, host=snapshot.host_id)
