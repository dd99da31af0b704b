"""Fake API and clean environment for the end-to-end tests that need no machine."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "unit" / "sdk")]

import fake_api  # noqa: E402 - found by the line above
from clean_environ import clean_environ  # noqa: E402 - as above


@pytest.fixture
def api(tmp_path: Path) -> Iterator[fake_api.FakeApi]:
    disk = tmp_path / "machine"
    disk.mkdir()
    with fake_api.running(disk) as server:
        server.add("a")
        yield server


@pytest.fixture
def environ(api: fake_api.FakeApi, tmp_path: Path) -> dict[str, str]:
    """Environment of a user who works with the fake."""
    return clean_environ(tmp_path) | {"FUSE_BASE_URL": api.url, "FUSE_TOKEN": api.token}
