"""The driver with whole processes: the fake in real jails, its guests as processes. As root."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest

from fusevm.host.agent import ask_shutdown
from fusevm.host.freezer import is_frozen
from fusevm.host.process import identify
from fusevm.host.vmm.firecracker.jail import Inside
from fusevm.host.vmm.firecracker.overwatch import Patience
from fusevm.model.errors import BadSetting, BootFailed, NotSupported, VmmMissing, VmmUnsuitable

#: Generous: the machine may be busy.
LIMIT_S = 60
pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


# -- programs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({"version": "1.16.0", "jailer_version": "1.16.0"}, "loses connections from the guest"),
        ({"version": "1.17.0-dev"}, "it is no release"),
        ({"jailer_version": "1.15.1"}, "its jailer 1.15.1"),
    ],
)
async def test_another_release_is_refused_with_the_reason(bench, versions, reason):
    driver = bench.make_driver(bench.install("others", **versions))
    with pytest.raises(VmmUnsuitable, match=reason) as caught:
        await bench.boot(driver=driver)
    assert caught.value.reason == "vmm_unsuitable"


async def test_programs_that_are_exchanged_are_judged_anew(bench):
    programs = bench.install("others")
    driver = bench.make_driver(programs)
    await bench.boot(driver=driver)
    text = programs.firecracker.read_text()
    programs.firecracker.unlink()
    programs.firecracker.write_text(text.replace("v1.16.1", "v1.16.0"))
    programs.firecracker.chmod(0o755)
    with pytest.raises(VmmUnsuitable):
        await bench.boot(driver=driver)


async def test_a_missing_jailer_is_named(bench):
    driver = bench.make_driver(msgspec.structs.replace(bench.programs, jailer=bench.folder / "nowhere"))
    with pytest.raises(VmmMissing, match="nowhere is not installed"):
        await bench.boot(driver=driver)


async def test_the_programs_may_be_links_to_files_of_any_name(bench, tmp_path):
    """The jail is named after the file that the link leads to; a machine is adopted also after an upgrade."""
    programs = bench.install("others", name="firecracker-v1.16.1-x86_64")
    link = tmp_path / "firecracker"
    link.symlink_to(programs.firecracker)
    driver = bench.make_driver(msgspec.structs.replace(programs, firecracker=link))
    vmm = await bench.boot(plan := await bench.plan(), driver)
    assert (plan.run_dir / "jail/firecracker-v1.16.1-x86_64" / plan.machine_id / "root").is_dir()
    await vmm.close()
    adopted = await bench.adopt(plan, vmm.process)
    assert await bench.ask_nonce(adopted) == plan.machine_id


# -- the jail ----------------------------------------------------------------------------------------------------------


async def test_the_process_is_in_its_jail_and_holds_nothing_of_the_daemons(bench):
    leaky = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(leaky, True)
    vmm = await bench.boot(plan := await bench.plan())
    os.close(leaky)
    proc = Path(f"/proc/{vmm.process.pid}")
    jail = plan.run_dir / "jail/firecracker" / plan.machine_id / "root"
    assert (proc / "root").stat().st_ino == jail.stat().st_ino
    assert not (proc / "root" / "root").exists()
    lines = (proc / "status").read_text().splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    assert status["Uid"] == status["Gid"] == [str(bench.uid)] * 4
    assert status["Groups"] == []
    assert int(status["CapEff"][0], 16) == 0
    memberships = (proc / "cgroup").read_text()
    assert memberships.count(plan.machine_id) >= len(plan.confinement.cgroups)
    targets = {str(entry.readlink()) for entry in (proc / "fd").iterdir()}
    assert "/dev/zero" not in targets


async def test_the_kernel_and_other_shared_files_keep_their_owner(bench):
    plan = await bench.plan()
    await bench.boot(plan)
    assert (plan.kernel.stat().st_uid, plan.kernel.stat().st_nlink) == (0, 2)


async def test_the_metadata_are_there_from_the_start(bench):
    vmm = await bench.boot(plan := await bench.plan())
    metadata = await vmm.api.metadata()
    assert metadata == {"latest": {"meta-data": {"instance-id": plan.machine_id}}}


async def test_a_boot_that_the_vmm_refuses_leaves_nothing(bench):
    plan = await bench.plan()
    plan.kernel.write_bytes(b"")
    with pytest.raises(BootFailed, match="kernel"):
        await bench.driver.boot(plan)
    assert sorted(path.name for path in plan.run_dir.iterdir() if path.name != "console.log") == [
        "initramfs",
        "overlay",
        "vmlinux",
    ]


async def test_files_that_cannot_be_linked_are_refused_before_anything_starts(bench):
    plan = msgspec.structs.replace(await bench.plan(), kernel=Path("/proc/version"))
    with pytest.raises(BadSetting, match="one file system"):
        await bench.driver.boot(plan)


async def test_a_jailer_that_fails_says_why(bench):
    plan = msgspec.structs.replace(await bench.plan(), machine_id="m_1")
    with pytest.raises(BootFailed, match="Invalid instance ID: m_1"):
        await bench.driver.boot(plan)


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_an_orderly_end_is_known_to_who_started_it_and_to_who_adopted_it(bench):
    for is_adopted in (False, True):
        vmm = await bench.boot(plan := await bench.plan())
        if is_adopted:
            await vmm.close()
            vmm = await bench.adopt(plan, vmm.process)
        async with asyncio.timeout(LIMIT_S):
            await ask_shutdown(vmm)
            assert await vmm.wait_exit() == "the guest shut down"


async def test_its_metrics_are_counted(bench):
    vmm = await bench.boot()
    await bench.ask_nonce(vmm)
    async with asyncio.timeout(LIMIT_S):
        await ask_shutdown(vmm)  # it says what it has counted when it ends
        await vmm.wait_exit()
    assert bench.counted == {"channel_connections": 2}


async def test_a_vmm_that_hangs_is_told_and_ended(bench):
    driver = bench.make_driver(patience=Patience(every_s=0.05, answer_s=0.2, strikes=3))
    vmm = await bench.boot(driver=driver)
    os.kill(vmm.process.pid, signal.SIGSTOP)
    async with asyncio.timeout(LIMIT_S):
        assert await vmm.wait_exit() == "the VMM hung: its API was silent for 0.75 s"
    assert identify(vmm.process.pid) is None


async def test_a_vmm_that_hangs_is_noticed_also_by_a_later_daemon(bench):
    first = await bench.boot(plan := await bench.plan())
    await first.close()
    os.kill(first.process.pid, signal.SIGSTOP)
    driver = bench.make_driver(patience=Patience(every_s=0.05, answer_s=0.2, strikes=3))
    vmm = await bench.adopt(plan, first.process, driver)
    async with asyncio.timeout(LIMIT_S):
        assert "the VMM hung" in await vmm.wait_exit()


async def test_a_vmm_that_may_not_be_looked_at_is_not_given_up(bench, monkeypatch):
    """Whoever hears that it has gone kills what is left of it."""

    def refuse(_pid):
        raise PermissionError

    first = await bench.boot(plan := await bench.plan())
    await first.close()
    with monkeypatch.context() as patch:
        patch.setattr("fusevm.host.vmm.firecracker.driver.root_of", refuse)
        with pytest.raises(PermissionError):
            await bench.adopt(plan, first.process)
    again = await bench.adopt(plan, first.process)
    assert await bench.ask_nonce(again) == plan.machine_id


# -- pauses ------------------------------------------------------------------------------------------------------------


async def test_a_paused_machine_is_silent_goes_on_and_is_not_taken_for_hung(bench):
    driver = bench.make_driver(patience=Patience(every_s=0.02, answer_s=0.05, strikes=2))
    vmm = await bench.boot(plan := await bench.plan(), driver)
    await vmm.pause()
    await vmm.pause()
    assert is_frozen(plan.confinement.cgroups)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await bench.ask_nonce(vmm)
    await vmm.resume()
    await vmm.resume()
    async with asyncio.timeout(LIMIT_S):
        assert await bench.ask_nonce(vmm) == plan.machine_id


async def test_a_paused_machine_stays_paused_for_the_next_daemon(bench):
    driver = bench.make_driver(patience=Patience(every_s=0.02, answer_s=0.05, strikes=2))
    first = await bench.boot(plan := await bench.plan(), driver)
    await first.pause()
    await first.close()
    vmm = await bench.adopt(plan, first.process, driver)
    await asyncio.sleep(0.3)
    assert is_frozen(plan.confinement.cgroups)
    await vmm.resume()
    async with asyncio.timeout(LIMIT_S):
        assert await bench.ask_nonce(vmm) == plan.machine_id


async def test_a_paused_machine_can_be_killed(bench):
    vmm = await bench.boot()
    await vmm.pause()
    async with asyncio.timeout(LIMIT_S):
        await vmm.kill()
    for order in (vmm.pause, vmm.resume):
        with pytest.raises(ConnectionError, match="killed by the daemon"):
            await order()


async def test_without_a_control_group_a_pause_is_refused(bench):
    plan = await bench.plan()
    bare = msgspec.structs.replace(plan.confinement, cgroups=())
    vmm = await bench.boot(msgspec.structs.replace(plan, confinement=bare))
    with pytest.raises(NotSupported):
        await vmm.pause()
    assert await bench.ask_nonce(vmm) == plan.machine_id


async def test_sockets_are_where_the_daemon_looks_for_them(bench):
    plan = await bench.plan()
    await bench.boot(plan)
    root = plan.run_dir / "jail/firecracker" / plan.machine_id / "root"
    for path in (Inside().api, Inside().vsock):
        assert (root / path.removeprefix("/")).is_socket()


async def test_a_jail_is_removed_however_deep_its_user_has_made_it(bench):
    """A VMM that was broken into may make it deeper than paths and stacks can follow."""
    vmm = await bench.boot(plan := await bench.plan())
    root = plan.run_dir / "jail/firecracker" / plan.machine_id / "root"
    descriptor = os.open(root, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=descriptor)
        deeper = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = deeper
    os.close(descriptor)
    os.kill(vmm.process.pid, signal.SIGKILL)
    async with asyncio.timeout(LIMIT_S):
        assert "SIGKILL" in await vmm.wait_exit()
    assert not (plan.run_dir / "jail").exists()
