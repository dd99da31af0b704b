"""The databases of the contract suite, quiet logs, and the harnesses on the path."""

import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "control"))
sys.path.insert(0, str(Path(__file__).parent))

from store_harness import KINDS, Place, inline_place, make_host, postgres_place, sqlite_place

from fusevm.control.store.location import MEMORY
from fusevm.control.store.protocol import Store
from fusevm.testing.postgres import PostgresServer


@pytest.fixture(autouse=True)
def _quiet_logs() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)


@pytest_asyncio.fixture(params=KINDS)
async def place(
    request: pytest.FixtureRequest, tmp_path: Path, postgres_server: PostgresServer
) -> AsyncIterator[Place]:
    """An empty database. The server is asked for by name: it must not seem to be started by a test."""
    del postgres_server
    match request.param:
        case "sqlite":
            yield sqlite_place(tmp_path / "fuse.db")
        case "inline":
            yield inline_place()
        case "postgres":
            async with postgres_place(request.getfixturevalue("postgres_url")) as found:
                yield found
        case _:
            yield sqlite_place(MEMORY)


@pytest_asyncio.fixture
async def store(place: Place) -> AsyncIterator[Store]:
    """A store with one host."""
    opened = await place.open()
    await opened.save_host(make_host("h1"))
    yield opened
    await opened.close()
