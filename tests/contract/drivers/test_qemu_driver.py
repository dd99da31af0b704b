"""What only the QEMU driver does: confinement, devices, sockets, the console from its first byte."""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from fusevm.host.cgroup import Cgroups, Limits, observe_mounts
from fusevm.host.vmm.driver import BootPlan, Confinement, Nic
from fusevm.host.vmm.qemu import QemuDriver
from fusevm.host.vmm.qemu_args import overhead_mib
from fusevm.model.errors import PathTooLong

BOOT_S = 120
as_root = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
UID, GID = 71_234, 71_235

#: Runs within the namespace: makes a tap and hands its descriptor over.
MAKE_TAP = """
import fcntl, os, socket, struct, sys
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"tap0", 0x0002 | 0x1000 | 0x4000))
os.system("ip link set lo up; ip addr add 10.9.0.1/24 dev tap0; ip link set tap0 up")
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"x"], [tap])
"""


@pytest.fixture(scope="session")
def under_test(drivers):
    """This driver alone."""
    return drivers["qemu"]


@pytest.fixture
def netns():
    """A network namespace of our own."""
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed")
    name = f"fuse-test-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield Path("/run/netns") / name
    subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
async def cgroups():
    """Groups below a parent of our own, removed afterwards."""
    parent = f"fuse-test-{secrets.token_hex(3)}"
    groups = Cgroups(parent, observe_mounts())
    yield groups
    for name in await groups.names():
        await groups.remove(name)
    for root in groups.roots():
        with contextlib.suppress(FileNotFoundError):
            (root / parent).rmdir()


def make_tap(netns: Path) -> int:
    import socket  # noqa: PLC0415

    ours, theirs = socket.socketpair()
    words = ["nsenter", f"--net={netns}", "--", sys.executable, "-c", MAKE_TAP, str(theirs.fileno())]
    subprocess.run(words, pass_fds=[theirs.fileno()], check=True)
    _, (tap, *_), _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    theirs.close()
    return tap


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def check_descriptors(pid: int, plan: BootPlan, base: Path, tap: str = "") -> None:
    """A VMM holds its disks, its tap, its output and its sockets, and of what has no name only what its loops need.

    Its memory is its own: there is no file of it to hold. Of control groups and the daemon's things it holds nothing.
    """
    targets = Counter(str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir())
    sockets = {target for target in targets if target.startswith("socket:")}
    nameless = {"anon_inode:[eventfd]", "anon_inode:[eventpoll]", "anon_inode:[signalfd]", "anon_inode:[timerfd]"}
    own = {str(path) for path in (plan.run_dir / "vmm.out", plan.overlay, base, plan.image)}
    left = targets.keys() - sockets - nameless - own - {"/dev/null", tap}
    assert left == set()
    assert targets[tap] == (1 if tap else 0)
    # Each of the three that the daemon has passed, and the daemon's connection to it.
    table = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    paths = {f"socket:[{fields[6]}]": fields[7] for fields in table if len(fields) > 7}
    ends = Counter(Path(paths.get(target, "unknown")) for target in sockets)
    assert ends == {plan.run_dir / name: 2 for name in ("agent.sock", "qmp.sock", "console.sock")}


@pytest.mark.parametrize("_", [pytest.param(0, marks=as_root)])
async def test_a_confined_machine_on_a_tap(bench, netns, cgroups, agent_of, _):
    tap = make_tap(netns)
    plan = await bench.plan(parameters="fuse.ip=10.9.0.2/24,10.9.0.1,1500")
    limits = Limits(memory_bytes=(plan.memory_mib + overhead_mib("tcg")) << 20, cpus=1, pids=200)
    group = await cgroups.ensure(plan.machine_id, limits)
    assert group.degraded == ()
    os.chown(plan.overlay, UID, GID)
    plan = msgspec.structs.replace(
        plan,
        nic=Nic(tap_fd=tap, mac="06:00:0a:09:00:02", netns=netns),
        confinement=Confinement(uid=UID, gid=GID, cgroups=group.paths),
    )
    leaky = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(leaky, True)
    vmm = await bench.boot(plan)
    os.close(leaky)
    os.close(tap)
    agent = agent_of(vmm)
    pid = vmm.process.pid
    assert "06:00:0a:09:00:02" in await agent.shell("cat /sys/class/net/eth0/address")
    ping = ["nsenter", f"--net={netns}", "--", "ping", "-c", "1", "-W", "60", "10.9.0.2"]
    if shutil.which("ping"):
        assert (await asyncio.to_thread(subprocess.run, ping, capture_output=True)).returncode == 0

    check_descriptors(pid, plan, bench.artefacts.blank, tap="/dev/net/tun")
    status = status_of(pid)
    assert status["Uid"].split() == [str(UID)] * 4
    assert status["Gid"].split() == [str(GID)] * 4
    assert status["Groups"] == ""
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == int(status["CapAmb"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert Path(f"/proc/{pid}/ns/net").stat().st_ino == netns.stat().st_ino
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "500"
    memberships = Path(f"/proc/{pid}/cgroup").read_text()
    assert memberships.count(plan.machine_id) >= len(group.paths)

    # The limits hold, and leave room for a guest that uses all of its memory and disk.
    await agent.shell(
        "head -c 90000000 /dev/urandom > /dev/shm/fill && head -c 100000000 /dev/zero > /root/fill && sync"
    )
    # Its own pages; those of the program file are shared by all machines and can be given back.
    used = int(status_of(pid)["RssAnon"].split()[0]) >> 10
    print(f"resident: {used} MiB of {plan.memory_mib} + {overhead_mib('tcg')}")
    assert plan.memory_mib < used < plan.memory_mib + overhead_mib("tcg")

    await cgroups.kill(plan.machine_id)
    async with asyncio.timeout(60):
        assert "SIGKILL" in await vmm.wait_exit()
    await cgroups.remove(plan.machine_id)
    assert await cgroups.names() == set()


async def test_a_vmm_holds_only_its_own_descriptors(bench, agent_of):
    leaky = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(leaky, True)
    vmm = await bench.boot(plan := await bench.plan())
    os.close(leaky)
    await agent_of(vmm).health()
    check_descriptors(vmm.process.pid, plan, bench.artefacts.blank)
    environment = Path(f"/proc/{vmm.process.pid}/environ").read_bytes().split(b"\0")
    assert {entry.partition(b"=")[0] for entry in environment if entry} <= {
        b"PATH",
        b"LC_ALL",
        b"PWD",
        b"OLDPWD",
        b"_",
        b"SHLVL",
    }
    fields = Path(f"/proc/{vmm.process.pid}/stat").read_text().rpartition(")")[2].split()
    assert int(fields[3]) == vmm.process.pid  # a session of its own
    assert int(fields[4]) == 0  # no terminal


async def test_the_console_is_complete_from_its_first_byte(bench, agent_of):
    vmm = await bench.boot(plan := await bench.plan(parameters="ignore_loglevel"))
    await agent_of(vmm).health()
    text = plan.console_log.read_text(errors="replace")
    assert text.lstrip().startswith("[    0.000000] Linux version")
    assert "fused:" in text
    assert plan.console_log.stat().st_mode & 0o777 == 0o600


async def test_the_console_goes_on_after_a_restart_of_the_daemon(bench, agent_of):
    vmm = await bench.boot(plan := await bench.plan())
    await agent_of(vmm).shell("echo before > /dev/ttyS0")
    await vmm.close()
    again = await bench.driver.adopt(plan, vmm.process)
    try:
        agent = agent_of(again)
        await agent.shell("echo after > /dev/ttyS0")
        async with asyncio.timeout(BOOT_S):
            while b"after" not in plan.console_log.read_bytes():
                await asyncio.sleep(0.05)
        assert b"before" in plan.console_log.read_bytes()
    finally:
        await again.kill()
        await again.close()


async def test_the_control_socket_answers_after_adoption_too(bench, agent_of):
    plan = await bench.plan()
    first = await bench.boot(plan)
    assert (await first.qmp.execute("query-status"))["status"] == "running"
    await first.close()
    second = await bench.driver.adopt(plan, first.process)
    try:
        async with asyncio.timeout(60):
            assert (await second.qmp.execute("query-status"))["running"]
    finally:
        await second.kill()
        await second.close()


async def test_user_network_needs_no_root(bench, agent_of):
    vmm = await bench.boot(nic=Nic(user_network="restrict=on", mac="06:00:00:00:00:07"))
    assert "06:00:00:00:00:07" in await agent_of(vmm).shell("cat /sys/class/net/eth0/address")


async def test_the_guests_clock_keeps_time(bench, agent_of):
    vmm = await bench.boot()
    agent = agent_of(vmm)
    loop = asyncio.get_running_loop()

    async def read() -> tuple[float, int, float]:
        """What the guest's clock showed between two moments of ours."""
        before = loop.time() * 1000
        uptime_ms = (await agent.health())["uptime_ms"]
        return before, uptime_ms, loop.time() * 1000

    first = await read()
    await asyncio.sleep(3)
    last = await read()
    # Within three seconds: the frequency is the host's, not a guess.
    assert last[0] - first[2] - 300 < last[1] - first[1] < last[2] - first[0] + 300


@pytest.mark.parametrize("_", [pytest.param(0, marks=as_root)])
async def test_without_root_everything_works_as_the_daemons_own_user(guest_artefacts, workshop, _):
    folder = workshop / secrets.token_hex(3)
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    script = f"""
import asyncio, json, sys
sys.path.insert(0, {str(Path(__file__).parents[3] / "src")!r})
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from conftest import DRIVERS, Agent, Artefacts, Workbench
async def main():
    artefacts = Artefacts(**{{k: Path(v) for k, v in json.loads(sys.argv[1]).items()}})
    bench = Workbench(DRIVERS["qemu"], artefacts, Path({str(folder)!r}))
    vmm = await bench.boot()
    try:
        print((await Agent(vmm).shell("id -un")).strip(), Path(f"/proc/{{vmm.process.pid}}").stat().st_uid)
    finally:
        await bench.close()
asyncio.run(main())
"""
    paths = json.dumps({name: str(getattr(guest_artefacts, name)) for name in guest_artefacts.__struct_fields__})
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", sys.executable, "-c", script, paths]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = await asyncio.to_thread(
        subprocess.run, words, capture_output=True, text=True, env=environment, timeout=BOOT_S, check=False
    )
    shutil.rmtree(folder)
    assert done.stdout.split() == ["root", "65534"], done.stderr


async def test_the_frequency_is_kept_for_the_next_driver(bench):
    await bench.boot()
    saved = json.loads((bench.folder / "tsc.json").read_text())
    (bench.folder / "tsc.json").write_text(json.dumps(saved | {"khz": saved["khz"] + 1}))
    second = QemuDriver(cache_dir=bench.folder)
    plan = await bench.plan()
    vmm = await second.boot(plan)
    words = Path(f"/proc/{vmm.process.pid}/cmdline").read_text()
    await vmm.kill()
    await vmm.close()
    assert f"tsc_early_khz={saved['khz'] + 1}" in words


async def test_a_socket_path_that_is_too_long_is_refused(bench):
    plan = await bench.plan()
    deep = plan.run_dir / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    with pytest.raises(PathTooLong):
        await bench.boot(msgspec.structs.replace(plan, run_dir=deep))
