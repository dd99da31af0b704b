"""The fake API of the client's tests on the path."""

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "sdk"))

import fake_api

from fusevm.sdk import AsyncFuse


@pytest.fixture
def api(tmp_path: Path) -> Iterator[fake_api.FakeApi]:
    with fake_api.running(tmp_path) as server:
        yield server


@pytest.fixture
async def fuse(api: fake_api.FakeApi) -> AsyncIterator[AsyncFuse]:
    async with AsyncFuse(api.url, fake_api.TOKEN) as client:
        yield client
