"""Faults of the systems that Fuse replaces, which no other test would notice here. `tests/faults.toml` has them all."""

import asyncio
import io
import os
import shutil
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from fusevm.host.boot_files import BootFiles
from fusevm.host.config import HostConfig
from fusevm.host.daemon import Daemon
from fusevm.host.faults import NoFault
from fusevm.host.images.ext4 import render_owners, run_debugfs, tar_owners, unpack_tar
from fusevm.host.images.store import Image, ImageRecord
from fusevm.host.quarters import HostQuarters
from fusevm.host.render import render_exec
from fusevm.host.run import run
from fusevm.host.storage import observe_storage
from fusevm.host.wiring import UserWiring
from fusevm.model.errors import BadField, BadSetting, BootFailed, CommandFailed, NoSpace
from fusevm.model.machine import Machine, Phase
from fusevm.testing.host_world import NOTHING, SPEC, World, fence, order, until
from fusevm.wire.guest import ExecRequest, ExecResult, StreamFlags

HANG = ExecRequest(cmd=["hang"])


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# -- orders at the same time -----------------------------------------------------------------------------------------


async def test_two_starts_at_once_boot_once(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await daemon.machines.stop("m-1", fence(action_seq=2))
        gate = world.driver.holds.hold("boot")
        world.driver.holds.reached("boot").clear()
        both = [asyncio.create_task(daemon.machines.start("m-1", fence(action_seq=3))) for _ in range(2)]
        await world.driver.holds.reached("boot").wait()
        gate.set()
        first, second = await asyncio.gather(*both)
        assert (first.phase, first.generation) == (second.phase, second.generation) == (Phase.RUNNING, 2)
    assert world.driver.boots == 2


async def test_a_command_that_hangs_holds_up_nobody(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), fence("u1"))
        await daemon.machines.create(order("m-2"), fence("u2"))
        hanging = asyncio.create_task(daemon.run_command("m-1", fence("u1"), HANG))
        agent = world.driver.processes["m-1"].agent
        await until(lambda: "POST /exec" in agent.requests)
        async with asyncio.timeout(60):
            assert (await daemon.run_command("m-1", fence("u1"), ExecRequest(cmd=["echo", "a"]))).exit_code == 0
            assert len(daemon.machines.records()) == 2
            await daemon.machines.stop("m-2", fence("u2", action_seq=2))
            await daemon.machines.delete("m-1", fence("u1", action_seq=2))
        with pytest.raises(ConnectionError):
            await hanging


async def test_a_stop_is_over_when_the_guest_is(world: World, monkeypatch):
    """No signal is waited out that nobody answers: the grace is longer than this test."""
    monkeypatch.setattr("fusevm.host.held_vmm.SHUTDOWN_GRACE_S", 3600.0)
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        async with asyncio.timeout(60):
            assert (await daemon.machines.stop("m-1", fence(action_seq=2))).phase is Phase.STOPPED


async def test_a_create_whose_client_has_left_is_undone_when_it_fails(world: World):
    gate = world.driver.holds.hold("boot")
    async with world.daemon() as daemon:
        creating = asyncio.create_task(daemon.machines.create(order(), fence()))
        await world.driver.holds.reached("boot").wait()
        creating.cancel()
        world.driver.boot_error = BootFailed(id="m-1", problem="no")
        gate.set()
        await until(lambda: daemon.machines.records() == [])
        assert world.leftovers == NOTHING
        world.driver.boot_error = None
        assert (await daemon.machines.create(order(), fence())).phase is Phase.RUNNING


# -- starts of the daemon --------------------------------------------------------------------------------------------


async def test_a_machine_that_hangs_at_the_start_keeps_nobody_waiting(world: World, monkeypatch):
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), fence("u1"))
        await daemon.machines.create(order("m-2"), fence("u2"))
    adopt = world.driver.adopt

    async def hang(plan, process):
        if plan.machine_id == "m-1":
            await asyncio.Event().wait()
        return await adopt(plan, process)

    monkeypatch.setattr(world.driver, "adopt", hang)
    async with asyncio.timeout(60), world.daemon() as daemon:
        assert {machine.id for machine in daemon.machines.records()} == {"m-1", "m-2"}
        assert await daemon.machines.guest("m-2", fence("u2"))
        await daemon.machines.create(order("m-3"), fence("u3"))
        await daemon.machines.delete("m-1", fence("u1", action_seq=2))


# -- files -----------------------------------------------------------------------------------------------------------


async def test_a_daemon_with_nothing_to_do_writes_nothing(world: World):
    def files() -> dict[str, tuple[int, int]]:
        return {
            path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in (world.root / "data").glob("journal*")
        }

    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await _sweep(daemon)
        before = files()
        assert "journal.db-wal" in before
        for _ in range(3):
            await _sweep(daemon)
            await daemon.facts()
            await daemon.render_state()
        assert files() == before


async def _sweep(daemon: Daemon) -> None:
    await daemon._sweep(is_start=False)


async def test_the_journal_is_for_its_owner_alone(world: World):
    """It holds the environment variables of machines, whatever umask the daemon was started with."""
    before = os.umask(0o022)
    try:
        async with world.daemon() as daemon:
            await daemon.machines.create(order(), fence())
            modes = {path.name: path.stat().st_mode & 0o077 for path in (world.root / "data").iterdir()}
    finally:
        os.umask(before)
    assert {"journal.db", "journal.db-wal", "ballast", "lock"} <= set(modes)
    assert set(modes.values()) == {0}


def test_the_storage_report_counts_what_sparse_files_take(tmp_path: Path):
    folder = tmp_path / "machines" / "m-1"
    folder.mkdir(parents=True)
    with (folder / "overlay.raw").open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.truncate(10 << 30)
    os.sync()
    report = observe_storage(HostConfig(data_root=tmp_path, run_dir=tmp_path / "run"), "now")
    assert 1 << 20 <= report.machines[0].system_bytes < 2 << 20
    assert report.total_bytes < 3 << 20


@pytest.mark.parametrize("root", ["", ".", "data"])
def test_a_data_directory_that_depends_on_the_working_directory_is_refused(root: str):
    with pytest.raises(BadSetting, match="data_root"):
        HostConfig(data_root=Path(root)).check()


# -- disks -----------------------------------------------------------------------------------------------------------


class _Images:
    def __init__(self, image: Image) -> None:
        self._image = image

    async def resolve(self, _name: str) -> Image:
        return self._image

    find = resolve


class _Files:
    found = BootFiles(kernel=Path("/k"), initramfs=Path("/i"), kernel_digest="k", kernel_version="6", agent_version="0")

    async def find(self) -> BootFiles:
        return self.found


@asynccontextmanager
async def _quarters(root: Path, monkeypatch) -> AsyncIterator[HostQuarters]:
    """Real quarters of a daemon without root, on a blank disk that needs no tool."""
    blank = root / "blank"
    with blank.open("wb") as file:
        file.truncate(SPEC.disk_bytes)

    async def ensure_blank(_root: Path, _size: int) -> Path:
        return blank

    monkeypatch.setattr("fusevm.host.disk.room.ensure_blank", ensure_blank)
    record = ImageRecord(digest="sha256:x", rootfs_sha256="x", size_bytes=1, created_at_ms=0)
    image = Image(record=record, names=("x",), directory=root)
    quarters = HostQuarters(
        HostConfig(data_root=root / "data", run_dir=root / "run"),
        images=_Images(image),
        boot_files=_Files(),
        wiring=UserWiring(user_network=False, ports=(20_000, 20_099)),
        cgroups=None,
        driver="fake",
        overhead_mib=1,
        fault=NoFault(),
    )
    await quarters.open({})
    yield quarters
    await quarters.close()


MACHINE = Machine(id="m-1", fence=fence(), spec=SPEC, phase=Phase.CREATING, nonce="n", created_at_ms=0, updated_at_ms=0)


async def test_half_a_disk_is_never_booted(tmp_path: Path, monkeypatch):
    """What a copy left that broke off (a full disk, a crash) has no name that a machine would boot from."""
    async with _quarters(tmp_path, monkeypatch) as quarters:
        folder = tmp_path / "data/machines/m-1"
        folder.mkdir()
        (folder / "overlay.new").write_bytes(b"half")
        plan = (await quarters.prepare(MACHINE)).plan
        assert plan.overlay is not None
        assert plan.overlay.name == f"overlay.{plan.overlay_format}"
        assert b"half" not in plan.overlay.read_bytes()[:16]
        assert [path.name for path in folder.glob("overlay*")] == [plan.overlay.name]
        await quarters.vacate(MACHINE, keep_disk=False)


async def test_a_disk_that_does_not_fit_is_an_error_and_leaves_no_disk(tmp_path: Path, monkeypatch):
    async def full(_blank: Path, path: Path, **_owner: object) -> None:
        path.write_bytes(b"half")
        raise NoSpace(path=str(path), needed=2, free=1)

    async with _quarters(tmp_path, monkeypatch) as quarters:
        monkeypatch.setattr("fusevm.host.disk.room.create_overlay", full)
        with pytest.raises(NoSpace):
            await quarters.prepare(MACHINE)
        assert list((tmp_path / "data/machines").iterdir()) == []
        assert list((tmp_path / "run").iterdir()) == []


# -- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("debugfs") is None, reason="e2fsprogs is not installed")
async def test_what_debugfs_could_not_do_fails_the_build(tmp_path: Path):
    """It exits with 0 whatever happened."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / 'a "b"').touch()
    image = tmp_path / "image"
    await run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", tmp_path / "tree", image, "1024k"],
        timeout_s=60,
    )
    await run_debugfs(image, render_owners({'/a "b"': (5, 6)}))
    stat = (await run(["debugfs", "-R", 'stat "/a ""b"""', image], timeout_s=60)).text.split()
    assert (stat[stat.index("User:") + 1], stat[stat.index("Group:") + 1]) == ("5", "6")
    with pytest.raises(CommandFailed, match="/nobody"):
        await run_debugfs(image, render_owners({"/nobody": (5, 6), '/a "b"': (7, 8)}))


def test_a_file_name_cannot_hold_a_command_for_debugfs():
    with pytest.raises(BadField, match="line break"):
        render_owners({"/a\ndump /etc/shadow /tmp/x": (1, 1)})


async def test_only_the_devices_of_the_root_are_left_out_of_an_image(tmp_path: Path):
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as archive:
        for name in ("dev/fuse", "app/dev/kept", "app/dev.txt"):
            entry = tarfile.TarInfo(name)
            entry.uid = entry.gid = 7
            archive.addfile(entry, io.BytesIO())
    await unpack_tar(tar, tmp_path / "tree", lambda _event: None)
    assert (tmp_path / "tree/app/dev/kept").is_file()
    assert not (tmp_path / "tree/dev/fuse").exists()
    assert set(tar_owners(tar)) == {"/app/dev/kept", "/app/dev.txt"}


# -- exec ------------------------------------------------------------------------------------------------------------


def test_what_the_contracts_exec_cannot_say_as_text_is_said_beside_it():
    plain = render_exec(ExecResult(exit_code=0, stdout_b64="b2sK", stderr_b64="", duration_ms=7))
    assert msgspec.to_builtins(plain) == {"exit_code": 0, "stdout": "ok\n", "stderr": "", "duration_ms": 7}
    cut = ExecResult(exit_code=0, stdout_b64="/w==", stderr_b64="", truncated=StreamFlags(stderr=True))
    assert msgspec.to_builtins(render_exec(cut)) == {
        "exit_code": 0,
        "stdout": "\ufffd",
        "stderr": "",
        "duration_ms": 0,
        "stdout_b64": "/w==",
        "truncated": {"stdout": False, "stderr": True},
    }
