"""Quarters without root: directories and disks really made, really removed."""

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from fusevm.host.admission import Limits
from fusevm.host.boot_files import BootFileFinder, BootFiles
from fusevm.host.config import HostConfig
from fusevm.host.faults import NoFault
from fusevm.host.images.store import ImageConfig, ImageStore, make_record
from fusevm.host.quarters import HostQuarters, check_reachable
from fusevm.host.removal import remove_tree
from fusevm.host.storage import observe_storage
from fusevm.host.strays import _named
from fusevm.host.vmm.driver import JAIL
from fusevm.host.wiring import UserWiring
from fusevm.model.errors import BadSetting, Error, ImageCorrupt, Internal
from fusevm.model.machine import Fence, Isolation, Machine, MachineSpec, Phase
from fusevm.model.network import Network

SPEC = MachineSpec(image="debian-12", memory_mib=256, disk_bytes=32 << 20, env={"A": "1"})
MACHINE = Machine(
    id="m-1",
    fence=Fence(cluster="c", uid="u", incarnation=1, action_seq=1),
    spec=SPEC,
    phase=Phase.CREATING,
    nonce="ab" * 16,
    created_at_ms=0,
    updated_at_ms=0,
)


@pytest.fixture
async def images(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "data")
    folder = tmp_path / "built"
    folder.mkdir()
    content = bytearray(4096)
    content[1024 + 0x38 : 1024 + 0x3A] = b"\x53\xef"
    (folder / "rootfs.ext4").write_bytes(content)
    store.root.mkdir(parents=True)
    config = ImageConfig(env={"B": "2"}, workdir="/srv", user="app")
    record = make_record(
        rootfs_sha256="0" * 64, size_bytes=4096, config=config, inputs="", source="test", created_at_ms=0
    )
    await store.publish(folder, "debian-12", record)
    return store


@pytest.fixture
async def quarters(tmp_path: Path, images: ImageStore) -> HostQuarters:
    config = HostConfig(data_root=tmp_path / "data", run_dir=tmp_path / "run")
    finder = BootFileFinder(config)
    finder.found = BootFiles(
        kernel=tmp_path / "vmlinux",
        initramfs=tmp_path / "initramfs",
        kernel_digest="k",
        kernel_version="6",
        agent_version="a",
    )
    quarters = HostQuarters(
        config,
        images=images,
        boot_files=finder,
        wiring=UserWiring(user_network=False, ports=(20_000, 20_099)),
        cgroups=None,
        driver="qemu",
        overhead_mib=160,
        fault=NoFault(),
    )
    await quarters.open({})
    return quarters


async def machine_of(quarters: HostQuarters) -> Machine:
    blueprint = await quarters.resolve(SPEC)
    return msgspec.structs.replace(MACHINE, image_digest=blueprint.image_digest)


async def test_a_machine_gets_directories_a_disk_and_a_plan(quarters: HostQuarters, tmp_path: Path):
    machine = await machine_of(quarters)
    lodging = await quarters.prepare(machine)
    plan = lodging.plan
    assert plan.overlay is not None
    assert plan.overlay.name == f"overlay.{plan.overlay_format}"
    assert plan.overlay.parent == tmp_path / "data/machines/m-1"
    assert plan.run_dir == tmp_path / "run/m-1"
    assert plan.run_dir.is_dir()
    assert f"fuse.nonce={machine.nonce}" in plan.command_line
    assert "fuse.hostname=m-1" in plan.command_line
    assert "fuse.ip=" in plan.command_line
    assert plan.nic is not None
    assert "restrict=on" in plan.nic.user_network
    assert not plan.nic.user_network.startswith("user,")
    assert (plan.confinement.uid, plan.confinement.cgroups) == (None, ())
    configure = lodging.configure
    assert (configure.hostname, configure.env) == ("m-1", {"A": "1"})
    assert configure.image is not None
    assert (configure.image.env, configure.image.workdir, configure.image.user) == ({"B": "2"}, "/srv", "app")


async def test_a_disk_is_kept_or_removed_as_ordered(quarters: HostQuarters):
    machine = await machine_of(quarters)
    disk = (await quarters.prepare(machine)).plan.overlay
    assert disk is not None
    marked = disk.read_bytes() + b"mark"
    disk.write_bytes(marked)
    await quarters.vacate(machine, keep_disk=True)
    assert disk.exists()
    assert (await quarters.prepare(machine)).plan.overlay.read_bytes() == marked
    await quarters.vacate(machine, keep_disk=False)
    await quarters.vacate(machine, keep_disk=False)
    assert not disk.parent.exists()


async def test_the_name_of_a_disk_and_not_its_content_tells_the_format(quarters: HostQuarters):
    machine = await machine_of(quarters)
    plan = (await quarters.prepare(machine)).plan
    assert plan.overlay is not None
    raw = plan.overlay.with_name("overlay.raw")
    plan.overlay.rename(raw)
    raw.write_bytes(b"QFI\xfb" + b"\0\0\0\3/etc/shadow")
    assert (await quarters.prepare(machine)).plan.overlay_format == "raw"


async def test_a_half_made_disk_is_made_anew(quarters: HostQuarters, tmp_path: Path):
    machine = await machine_of(quarters)
    folder = tmp_path / "data/machines/m-1"
    folder.mkdir()
    (folder / "overlay.new").write_bytes(b"half")
    await quarters.prepare(machine)
    assert not (folder / "overlay.new").exists()


async def test_what_cannot_be_prepared_leaves_nothing(quarters: HostQuarters, tmp_path: Path, monkeypatch):
    machine = await machine_of(quarters)

    async def no_blank(_data, _size):
        raise Internal(problem="no blank")

    monkeypatch.setattr("fusevm.host.disk.room.ensure_blank", no_blank)
    with pytest.raises(Internal, match="no blank"):
        await quarters.prepare(machine)
    assert list((tmp_path / "data/machines").iterdir()) == []
    assert list((tmp_path / "run").iterdir()) == []


async def test_a_machine_without_its_image_can_still_be_taken_over(quarters: HostQuarters, images: ImageStore):
    machine = await machine_of(quarters)
    await quarters.prepare(machine)
    shutil.rmtree((await images.resolve("debian-12")).directory)
    lodging = await quarters.rejoin(machine)
    assert (lodging.plan.image, lodging.configure.image) == (None, None)
    with pytest.raises(ImageCorrupt):
        await quarters.prepare(machine)


async def test_limits_are_those_of_this_host(quarters: HostQuarters):
    limits = await quarters.limits()
    assert isinstance(limits, Limits)
    assert limits.cpus == len(os.sched_getaffinity(0))
    assert 0 < limits.memory_mib < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    assert 0 < limits.disk_free_bytes <= limits.disk_bytes
    assert (await quarters.resolve(SPEC)).isolation is Isolation.USER_NETWORK
    assert quarters.numbers().slot_count == 0


async def test_the_console_tail_is_printable(quarters: HostQuarters):
    assert (await quarters.remains("m-1")).console_tail == ""
    log = quarters.console_log("m-1")
    log.parent.mkdir(parents=True)
    log.write_bytes(b"x\n" * 50_000 + b"\x1b[31mfused: FATAL: no disk\x1b[0m\r\n\xff\n")
    assert (await quarters.remains("m-1")).console_tail.splitlines()[-1] == "fused: FATAL: no disk"


async def test_storage_is_counted_in_blocks(quarters: HostQuarters, tmp_path: Path):
    machine = await machine_of(quarters)
    plan = (await quarters.prepare(machine)).plan
    assert plan.overlay is not None
    with plan.overlay.open("r+b") as file:
        file.truncate(1 << 40)
    config = HostConfig(data_root=tmp_path / "data", run_dir=tmp_path / "run")
    report = observe_storage(config, "now")
    (found,) = report.machines
    assert (found.machine_id, found.user_bytes) == ("m-1", 0)
    assert 0 < found.system_bytes < 64 << 20
    assert report.total_bytes < 1 << 30
    jail = plan.overlay.parent / JAIL
    jail.mkdir()
    (jail / "overlay").hardlink_to(plan.overlay)
    (jail / "own").write_bytes(bytes(8192))
    (with_jail,) = observe_storage(config, "now").machines
    assert with_jail.system_bytes == found.system_bytes
    assert with_jail.runtime_bytes - found.runtime_bytes in range(8192, 64 << 10)
    assert observe_storage(HostConfig(data_root=tmp_path / "none", run_dir=tmp_path / "r"), "now").total_bytes == 0


def test_directories_that_machines_cannot_enter_are_named(tmp_path: Path):
    inner = tmp_path / "closed" / "inner"
    inner.mkdir(parents=True)
    inner.parent.chmod(0o700)
    with pytest.raises(BadSetting, match="chmod o"):
        check_reachable(inner)


def test_a_tree_is_removed_without_following_links(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(outside)
    remove_tree(tree)
    remove_tree(tree)
    assert (outside / "precious").exists()


def test_a_stray_is_known_by_its_disk_and_its_name():
    marker = "/d/machines/"
    assert _named(["qemu", "-name", "m-1", "file=/d/machines/m-1/overlay.raw"], marker) == {"m-1"}
    assert _named(["tail", "-f", "/d/machines/m-1/console.log"], marker) == set()
    assert _named(["qemu", "-name", "m-1", "file=/e/machines/m-1/overlay.raw"], marker) == set()
    assert _named(["ls", "/d/machines/"], marker) == set()


async def test_policies_are_those_of_the_machine():
    wiring = UserWiring(user_network=True, ports=(20_000, 20_099))
    open_machine = msgspec.structs.replace(MACHINE, spec=msgspec.structs.replace(SPEC, network=Network(internet=True)))
    closed = msgspec.structs.replace(MACHINE, spec=msgspec.structs.replace(SPEC, network=Network(internet=False)))
    assert "restrict=off" in (await wiring.connect(open_machine)).nic.user_network
    assert "restrict=on" in (await wiring.connect(closed)).nic.user_network


async def test_a_host_without_boot_files_serves_and_says_what_is_missing(
    tmp_path: Path, images: ImageStore, monkeypatch
):
    async def no_kernel(_self, _path=None, **_more):
        raise Internal(problem="no mirror")

    monkeypatch.setattr("fusevm.host.images.kernel.KernelStore.ensure", no_kernel)
    config = HostConfig(data_root=tmp_path / "data", run_dir=tmp_path / "run")
    finder = BootFileFinder(config)
    assert await finder.try_find() is None
    with pytest.raises(Error, match="no mirror"):
        await finder.find()
