"""Fixtures of the real tests. The host of a test is empty at its end, or the test fails."""

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from artefacts import ensure_artefacts
from fusevm.host.images.build import build_from_tree
from fusevm.host.images.initramfs import agent_path, ensure_initramfs
from fusevm.host.images.kernel import KernelStore
from fusevm.host.images.store import ImageConfig, ImageStore
from fusevm.model.errors import VmmMissing
from own_world import run_prefix
from previous_agent import NotAvailable, previous_agent

sys.path.insert(0, str(Path(__file__).parent))

from real_host import Box, Guest, Host, emptied, make_fence, make_jail_host


@pytest.fixture(scope="session")
def artefacts() -> Path:
    """A data directory with kernel, initramfs and image; found, else made."""
    if os.geteuid() != 0:
        pytest.skip("needs root for namespaces of its own")
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    try:
        return ensure_artefacts()
    except VmmMissing as e:
        pytest.skip(str(e))


@pytest.fixture
def host(artefacts: Path) -> Iterator[Host]:
    """A host without a daemon, in a box of its own; at the end nothing of machines may be left."""
    host = Host(Box(), artefacts, f"{run_prefix()}h")
    with emptied(host):
        yield host


@pytest.fixture
def jail_host(artefacts: Path) -> Iterator[Host]:
    """As `host`, for machines on Firecracker's fake: real guests in real jails."""
    host = make_jail_host(artefacts, f"{run_prefix()}f", "qemu")
    with emptied(host):
        yield host


@pytest.fixture(scope="session")
def shared_host(artefacts: Path) -> Iterator[Host]:
    """A running daemon for tests that do not harm it."""
    host = Host(Box(), artefacts, f"{run_prefix()}s", warm_slots=1)
    try:
        asyncio.run(host.start())
        yield host
    finally:
        host.close()


@pytest.fixture(scope="session")
def guest(shared_host: Host) -> Guest:
    """A running machine for tests that do not harm it."""
    fence = make_fence("shared")
    asyncio.run(shared_host.create("m-shared", fence, env={"COLOUR": "blue"}))
    return Guest(shared_host, "m-shared", fence)


@pytest.fixture(scope="session")
def bare_artefacts(artefacts: Path) -> Iterator[Path]:
    """Artefacts whose only image, `bare`, is one static program: no shell, no Python, no users."""
    root = Path(tempfile.mkdtemp(prefix="fuse-bare-", dir="/var/tmp"))
    root.chmod(0o755)
    for name in ("kernels", "initramfs", "blanks"):
        (root / name).symlink_to(artefacts / name)
    tree = root / "tree"
    (tree / "bin").mkdir(parents=True)
    # The agent is a static program that does no harm when it is called with words.
    shutil.copy(agent_path(), tree / "bin" / "tool")
    asyncio.run(build_from_tree(ImageStore(root), "bare", tree, config=ImageConfig()))
    yield root
    shutil.rmtree(root)


@pytest.fixture
def bare_host(bare_artefacts: Path) -> Iterator[Host]:
    """As `host`, for machines of the image `bare`."""
    host = Host(Box(), bare_artefacts, f"{run_prefix()}b")
    with emptied(host):
        yield host


@pytest.fixture(scope="session")
def older_artefacts(artefacts: Path) -> Iterator[Path]:
    """Artefacts whose initramfs holds the agent of the release before, under the name that the daemon looks for."""
    try:
        agent = previous_agent()
    except NotAvailable as e:
        pytest.skip(str(e))
    root = Path(tempfile.mkdtemp(prefix="fuse-older-", dir="/var/tmp"))
    root.chmod(0o755)
    for name in ("kernels", "images", "blanks"):
        (root / name).symlink_to(artefacts / name)
    asyncio.run(_disguise(root, artefacts, agent))
    yield root
    shutil.rmtree(root)


async def _disguise(root: Path, artefacts: Path, agent: Path) -> None:
    kernel = await KernelStore(artefacts).ensure()
    expected = await ensure_initramfs(artefacts, kernel)
    (await ensure_initramfs(root, kernel, agent)).rename(root / "initramfs" / expected.name)


@pytest.fixture
def older_host(older_artefacts: Path) -> Iterator[Host]:
    """As `host`, for machines with the previous agent."""
    host = Host(Box(), older_artefacts, f"{run_prefix()}o")
    with emptied(host):
        yield host
