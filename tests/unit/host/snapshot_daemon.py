"""A daemon with a fake VMM for tests of snapshots: real journal, real bytes, small disks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from file_server import FileServer

from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.daemon import Daemon
from fusevm.host.images.addresses import parse_networks
from fusevm.host.images.fetch import FetchPolicy
from fusevm.testing.host_world import World, order

LOOPBACK = FetchPolicy(allowed=parse_networks(["127.0.0.0/8"]), max_bytes=1 << 26, reserve_bytes=4096)


@asynccontextmanager
async def serving_daemon(world: World) -> AsyncIterator[tuple[Daemon, httpx.AsyncClient]]:
    async with world.daemon() as daemon:
        app = Boundary(make_router(daemon), daemon.metrics, secret=None)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as http:
            yield daemon, http


async def make(daemon: Daemon, machine_id: str = "m-1") -> None:
    """A machine of nobody's cluster, as computer-host's users have."""
    await daemon.machines.create(order(machine_id), None)


def hold_agent(world: World) -> asyncio.Event:
    """From now on whoever speaks to an agent waits."""
    world.driver.holds.reached("agent").clear()
    return world.driver.holds.hold("agent")


def bytes_of(world: World) -> set[str]:
    return {entry.name for entry in (world.root / "data" / "snapshots").iterdir()}


async def take_with(world: World, daemon: Daemon, content: bytes) -> dict[str, object]:
    await make(daemon)
    world.disks.write("m-1", content)
    taken = await daemon.snapshots.take("m-1", "s-1", None, live=False)
    (artifact,) = taken.artifacts
    return {"size_bytes": artifact.size_bytes, "sha256": artifact.sha256}


def durable(
    files: FileServer, known: dict[str, object], machine_id: str = "m-9", **changes: object
) -> dict[str, object]:
    artifact = {
        "id": "disk-system",
        "kind": "disk",
        "name": "../../../etc/cron.d/evil",
        "size_bytes": known["size_bytes"],
        "sha256_hex": known["sha256"],
        "download_url": files.url("/disk"),
        **changes,
    }
    snapshot = {"snapshot_id": "s-1", "machine_id": "m-1", "image_id": "sha256:debian-12", "artifacts": [artifact]}
    return {"machine_id": machine_id, "storage_bytes": 1 << 30, "snapshot": snapshot}
