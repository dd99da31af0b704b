"""The fake API for tests of the client library."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fake_api


@pytest.fixture(scope="session")
def shared_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fake_api.FakeApi]:
    with fake_api.running(tmp_path_factory.mktemp("disk")) as server:
        yield server


@pytest.fixture
def api(shared_api: fake_api.FakeApi, tmp_path: Path) -> fake_api.FakeApi:
    """A server without a memory, for tests that leave it running."""
    disk = tmp_path / "disk"
    disk.mkdir()
    shared_api.reset(disk)
    return shared_api


@pytest.fixture
def own_api(tmp_path: Path) -> Iterator[fake_api.FakeApi]:
    """A server for tests that stop it."""
    disk = tmp_path / "own-disk"
    disk.mkdir()
    with fake_api.running(disk) as server:
        yield server
