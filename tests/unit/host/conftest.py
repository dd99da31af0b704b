"""What tests of several modules share; makes their modules importable whatever pytest's import mode is."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "images"))

from api_client import Api
from journal_orders import Time

from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.faults import NoFault
from fusevm.host.journal import Journal
from fusevm.host.listeners import bind_unix, serving
from fusevm.testing.host_world import World


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """A daemon that serves on a Unix socket."""
    world = World(tmp_path)
    async with world.daemon() as daemon:
        path = tmp_path / "api.sock"
        app = Boundary(make_router(daemon), daemon.metrics, secret=None)
        async with serving(bind_unix(path), app):
            yield Api(world, daemon, path)
            daemon.events.close()


@pytest.fixture
def time() -> Time:
    """The clock of `journal`."""
    return Time()


@pytest.fixture
async def journal(tmp_path: Path, time: Time) -> AsyncIterator[Journal]:
    """One of its own."""
    journal = await Journal.open(tmp_path / "root", NoFault(), time)
    yield journal
    await journal.close()
