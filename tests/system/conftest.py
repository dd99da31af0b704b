"""Makes `namespaces`, `network_lab` and `real_host` importable whatever pytest's import mode is."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from artefacts import ensure_artefacts
from fusevm.model.errors import VmmMissing
from own_world import run_prefix

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "real"))

from real_host import Box, Host, emptied, make_jail_host


@pytest.fixture(scope="session")
def artefacts() -> Path:
    """A data directory with kernel, initramfs and image; found, else made."""
    if os.geteuid() != 0:
        pytest.skip("needs root for namespaces of its own")
    try:
        return ensure_artefacts()
    except VmmMissing as e:
        pytest.skip(str(e))


@pytest.fixture
def jail_host(artefacts: Path) -> Iterator[Host]:
    """A host without a daemon, in a box of its own, for machines on Firecracker's fake: processes in real jails."""
    host = make_jail_host(artefacts, f"{run_prefix()}j", "process")
    with emptied(host):
        yield host


@pytest.fixture
def agent_host(artefacts: Path) -> Iterator[Host]:
    """A host without a daemon, in a box of its own, whose VMMs will be small processes: everything else is real."""
    host = Host(Box(), artefacts, f"{run_prefix()}a", module="fusevm.testing.agent_daemon")
    with emptied(host):
        yield host
