"""For every test: a world of its own for the whole run, and a look at what each test leaves behind. And what tests of
several folders share: one real PostgreSQL per session, started by the first test that asks."""

import asyncio
import inspect
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
import uvloop
from hypothesis import HealthCheck, settings

from fusevm.testing.postgres import PostgresServer

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_rounds
import leaks
from own_world import DATA, INSIDE, enter_own_world, keep_temporary_files_in, run_prefix
from raised import (  # noqa: F401 - hooks of pytest
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_deselected,
    pytest_runtest_makereport,
    pytest_runtest_setup,
)

# How long an example takes says more about the machine than about us.
settings.register_profile("fuse", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("fuse")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of our own."""
    fuzz_rounds.add_options(parser)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Before any test is collected."""
    fuzz_rounds.take_options(session.config)


@pytest.fixture(scope="session", autouse=True)
def watch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> leaks.Watch:
    """The world of this run, and who looks at it."""
    base = tmp_path_factory.getbasetemp()
    run_prefix()
    keep_temporary_files_in(base / "t")
    uvloop.new_event_loop().close()  # the first one makes a pipe that libuv keeps for the process
    watch = leaks.Watch()
    if os.geteuid() == 0 and not os.environ.get(INSIDE):
        enter_own_world(base, request.config.rootpath, DATA)
        watch.enter()
    return watch


@pytest.fixture(scope="module", autouse=True)
def left_by_module(request: pytest.FixtureRequest, watch: leaks.Watch) -> Iterator[None]:
    """Fail a module that leaves control groups, or what its tests were not asked for."""
    yield from _fail_if_left(watch, leaks.OF_RUN | (leaks.OF_STACK if _shares_a_stack(request.node) else frozenset()))


@pytest.fixture(autouse=True)
def left_by_test(request: pytest.FixtureRequest, watch: leaks.Watch, left_by_module: None) -> Iterator[None]:
    """Fail a test that leaves something behind."""
    yield from _fail_if_left(watch, leaks.KINDS - (leaks.OF_STACK if _shares_a_stack(request.node) else frozenset()))


def _shares_a_stack(node: pytest.Item | pytest.Collector) -> bool:
    """Within such a module tests restart daemons and use up warm slots: looked at when the module is over."""
    return node.get_closest_marker("shared_stack") is not None


def _fail_if_left(watch: leaks.Watch, kinds: frozenset[str]) -> Iterator[None]:
    before = watch.observe(kinds)
    yield
    left = leaks.await_gone(lambda: watch.observe(kinds) - before)
    said = ", ".join(map(str, left))
    leaks.end(left)
    assert not left, f"left behind: {said}"


@pytest.fixture(autouse=True)
def logs_stay_as_they_are() -> Iterator[None]:
    """A command that runs within a test sets the logs up for its own standard error, which is closed afterwards."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(autouse=True)
def tasks_left(request: pytest.FixtureRequest, left_by_test: None) -> None:
    """Fail a test that leaves tasks: looked at when its fixtures are gone, and its loop is not."""
    if inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        request.getfixturevalue("_loop_is_empty")


@pytest.fixture
async def _loop_is_empty() -> AsyncIterator[None]:
    yield
    left = await leaks.tasks_left(asyncio.current_task())
    assert not left, f"tasks left behind: {left}"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running server; see `fusevm.testing.postgres`."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """URL of a fresh, empty database."""
    with postgres_server.database() as url:
        yield url
