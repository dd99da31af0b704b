"""computer-host's machine API on a Unix socket: the real daemon, with a driver and a guest that are fakes."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.listeners import bind_unix, serving
from fusevm.testing.host_world import World

sys.path.insert(0, str(Path(__file__).parent))

from machine_client import MachineApi


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
async def api(world: World, tmp_path: Path) -> AsyncIterator[MachineApi]:
    async with world.daemon() as daemon:
        path = tmp_path / "firecracker-host.sock"
        async with serving(bind_unix(path), Boundary(make_router(daemon), daemon.metrics, secret=None)):
            yield MachineApi(world, daemon, path)
            daemon.events.close()
