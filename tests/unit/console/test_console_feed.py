"""What the pages share, against the fake API."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from fake_api import FakeApi

from fusevm.console.feed import Board, Feed
from fusevm.model.errors import Unauthorized
from fusevm.sdk import AsyncFuse
from fusevm.sdk.failures import ServerUnreachable


@pytest.fixture
async def feed(fuse: AsyncFuse) -> AsyncIterator[Feed]:
    made = Feed(fuse)
    running = asyncio.ensure_future(made.run())
    yield made
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def board_with(feed: Feed, is_right: Callable[[Board], bool]) -> Board:
    """The next board of which that is true."""
    seen: Board | None = None
    async with asyncio.timeout(60):
        while True:
            seen = await feed.after(seen)
            if is_right(seen):
                return seen


async def test_nothing_is_asked_while_nobody_watches(api: FakeApi, fuse: AsyncFuse, feed: Feed) -> None:
    await fuse.version()
    assert [path for _, path, _, _ in api.requests] == ["/v1/version"]
    assert feed.board == Board()


async def test_environments_and_hosts_are_read_and_read_again(api: FakeApi, feed: Feed) -> None:
    api.add("a")
    with feed.watched():
        board = await board_with(feed, lambda board: board.is_known)
        assert [one.id for one in board.environments] == ["fuse-a"]
        assert [host.id for host in board.hosts] == ["default"]
        assert (board.is_cut, board.problem) == (False, None)
        api.add("b")
        feed.refresh()
        await board_with(feed, lambda board: len(board.environments) == 2)


async def test_a_failure_keeps_what_was_known_and_passes(api: FakeApi, feed: Feed) -> None:
    api.add("a")
    with feed.watched():
        await board_with(feed, lambda board: board.is_known)
        api.stop()
        board = await board_with(feed, lambda board: board.problem is not None)
        assert isinstance(board.problem, ServerUnreachable)
        assert [one.id for one in board.environments] == ["fuse-a"]
        api.start()
        board = await board_with(feed, lambda board: board.problem is None)
        assert [one.id for one in board.environments] == ["fuse-a"]


async def test_a_wrong_token_is_a_problem_of_its_own(api: FakeApi, feed: Feed) -> None:
    api.token = "another"
    with feed.watched():
        board = await board_with(feed, lambda board: board.problem is not None)
    assert isinstance(board.problem, Unauthorized)
    assert not board.is_known
