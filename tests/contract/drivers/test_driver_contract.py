"""What every driver does. Machines are real: each test says in its name what a host daemon relies on."""

import asyncio
import base64
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from fusevm.host.channel import AgentClient
from fusevm.host.disk.superblock import is_cleanly_left
from fusevm.host.process import identify
from fusevm.host.vmm.driver import BootPlan, Confinement
from fusevm.model.errors import BootFailed, VmmMissing
from fusevm.model.machine import VmmProcess
from fusevm.testing.processes import observe_cpu_s
from fusevm.wire.http1 import Connection

#: Generous: two cores, software emulation, and whatever else the machine does.
BOOT_S = 120
#: How long an idle machine is watched, and the part of a core that it may take.
IDLE_S, IDLE_CPU = 4.0, 0.1
pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


# -- talking to the agent ----------------------------------------------------------------------------------------------


async def test_the_right_guest_answers(agent, shared, nonce_of):
    health = await agent.health()
    assert health["ok"]
    assert health["nonce"] == nonce_of(shared.plan.machine_id)
    assert health["protocol"].startswith("1.")


async def test_commands_run_in_the_image_with_the_overlay(agent):
    assert "bookworm" in await agent.shell("cat /etc/os-release")
    await agent.shell("echo kept > /root/file && sync")
    assert await agent.shell("cat /root/file") == "kept\n"
    kib = int(await agent.shell("df -k --output=size / | tail -1"))
    assert kib > 900_000  # a blank of 1 GiB


async def test_the_clock_is_what_the_guest_was_told(agent):
    """Whatever it was before: a Firecracker's guest begins at the epoch, another has its host's time from a device."""
    told = time.time_ns() + 86_400_000_000_000  # no device of any host says tomorrow
    try:
        await agent.configure({"time_unix_ns": told})
        heard = (await agent.health())["time_unix_ns"]
        assert told <= heard < told + BOOT_S * 1_000_000_000
        assert int(await agent.shell("date +%s")) >= told // 1_000_000_000
    finally:
        await agent.configure({"time_unix_ns": time.time_ns()})


async def test_two_hundred_streams_at_once(vmm):
    """They are open all together, and each is used before and after the others are."""
    all_open, most, is_open = asyncio.Barrier(200), 0, 0

    async def health(connection: Connection) -> str:
        async with await connection.request("GET", "/health") as response:
            return json.loads(await response.read())["nonce"]

    async def ask() -> list[str]:
        nonlocal most, is_open
        connection = Connection(await vmm.open_stream())
        is_open += 1
        most = max(most, is_open)
        try:
            before = await health(connection)
            await all_open.wait()
            return [before, await health(connection)]
        finally:
            is_open -= 1
            await connection.close()

    async with asyncio.timeout(BOOT_S):
        answers = await asyncio.gather(*(ask() for _ in range(200)))
    assert most == 200
    assert len({nonce for pair in answers for nonce in pair}) == 1


async def test_bytes_survive_up_and_down(agent):
    payload = os.urandom(6 << 20)

    async def pieces():
        for at in range(0, len(payload), 100_000):
            yield payload[at : at + 100_000]

    async with asyncio.timeout(BOOT_S):
        async with await agent.http.request("PUT", "/files?path=/tmp/big", body=pieces()) as response:
            written = json.loads(await response.read())
        async with await agent.http.request("GET", "/files?path=/tmp/big") as response:
            back = await response.read()
    await agent.shell("rm /tmp/big")
    assert written["sha256"] == hashlib.sha256(payload).hexdigest()
    assert back == payload


async def test_a_stream_that_nobody_reads_does_not_block_the_others(agent):
    await agent.shell("head -c 20000000 /dev/zero > /tmp/zeros")
    async with asyncio.timeout(BOOT_S):
        lazy = await agent.http.request("GET", "/files?path=/tmp/zeros")
        for _ in range(10):
            assert (await agent.health())["ok"]
        assert len(await lazy.read()) == 20_000_000
    await agent.shell("rm /tmp/zeros")


async def test_fifty_disconnects_and_reconnects(shared, under_test, workshop, agent_of, nonce_of):
    driver = under_test.make(workshop)
    nonces = set()
    for i in range(50):
        vmm = await driver.adopt(shared.plan, shared.process)
        async with asyncio.timeout(BOOT_S):
            if i % 3:  # also connections that are dropped before they are agreed on
                nonces.add((await agent_of(vmm).health())["nonce"])
        await vmm.close()
    assert nonces == {nonce_of(shared.plan.machine_id)}


# -- daemons come and go -----------------------------------------------------------------------------------------------

#: A daemon that takes over a machine, starts to talk to it and is killed in the middle.
DAEMON = """
import asyncio, pickle, sys
from pathlib import Path
import msgspec
sys.path.insert(0, sys.argv[1])
from conftest import DRIVERS
from fusevm.host.channel import AgentClient

async def main():
    driver = DRIVERS[sys.argv[2]].make(Path(sys.argv[3]))
    plan, process = pickle.loads(bytes.fromhex(sys.argv[4]))
    if sys.argv[5] == "boot":
        vmm = await driver.boot(plan)
        print(msgspec.json.encode(vmm.process).decode(), flush=True)
        await asyncio.sleep(60)
    vmm = await driver.adopt(plan, process)
    agent = AgentClient(vmm.open_stream)
    async def pieces():
        while True:
            yield bytes(100_000)
            print("going", flush=True)
    match sys.argv[5]:
        case "upload":
            await agent.request("PUT", "/files?path=/tmp/torn", body=pieces())
        case "download":
            response = await agent.request("POST", "/exec", body=b'{"shell": "head -c 60000000 /dev/zero"}')
            print("going", flush=True)
            async for chunk in response.chunks():
                print("going", flush=True)
        case "hold":
            await (await agent.request("GET", "/health")).read()
            print("going", flush=True)
            await asyncio.sleep(600)
        case "exec":
            asyncio.get_running_loop().call_later(0.3, lambda: print("going", flush=True))
            await agent.request("POST", "/exec", body=b'{"shell": "exec sleep 4242"}')

asyncio.run(main())
"""


class Daemon:
    """A process that does something with a machine until it is killed."""

    def __init__(self, name: str, folder: Path, plan: BootPlan, process, deed: str) -> None:
        words = [sys.executable, "-c", DAEMON, str(Path(__file__).parent), name, str(folder)]
        words += [pickle.dumps((plan, process)).hex(), deed]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    async def line(self) -> str:
        async with asyncio.timeout(BOOT_S):
            return await asyncio.to_thread(self._process.stdout.readline)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


@pytest.mark.parametrize("deed", ["upload", "exec", "download"])
async def test_a_daemon_killed_in_the_middle_leaves_a_machine_that_answers_rightly(
    shared, under_test, workshop, deed, agent_of, nonce_of
):
    for lines in (1, 2, 5):
        daemon = Daemon(under_test.name, workshop, shared.plan, shared.process, deed)
        for _ in range(lines if deed == "upload" else 1):
            assert "going" in await daemon.line()
        daemon.kill()
        vmm = await under_test.make(workshop).adopt(shared.plan, shared.process)
        try:
            agent = agent_of(vmm)
            assert (await agent.health())["nonce"] == nonce_of(shared.plan.machine_id)
            assert await agent.shell("echo right") == "right\n"
            assert (
                await agent.shell("ls /tmp/torn 2>&1 || true")
                == "ls: cannot access '/tmp/torn': No such file or directory\n"
            )
            await agent.shell("for i in $(seq 100); do pgrep -f 'sleep 424[2]' || exit 0; sleep 0.1; done; exit 1")
        finally:
            await vmm.close()


async def test_a_machine_outlives_the_daemon_that_started_it(bench, agent_of, nonce_of):
    plan = await bench.plan()
    daemon = Daemon(bench.under_test.name, bench.folder, plan, None, "boot")
    process = msgspec.json.decode(await daemon.line(), type=VmmProcess)
    daemon.kill()
    assert identify(process.pid) == process
    vmm = await bench.driver.adopt(plan, process)
    try:
        assert (await agent_of(vmm).health())["nonce"] == nonce_of(plan.machine_id)
        os.kill(process.pid, signal.SIGKILL)  # no child of ours: its end is noticed all the same
        async with asyncio.timeout(60):
            assert await vmm.wait_exit()
    finally:
        await vmm.kill()
        await vmm.close()
    assert identify(process.pid) is None


async def test_a_second_driver_adopts_what_the_first_let_go(bench, shared, agent_of):
    second = bench.under_test.make(bench.folder)
    first_hold = await bench.driver.adopt(shared.plan, shared.process)
    await first_hold.close()
    vmm = await second.adopt(shared.plan, shared.process)
    assert vmm.process == shared.process
    assert (await agent_of(vmm).health())["ok"]
    await vmm.close()
    with pytest.raises(ConnectionError):
        await vmm.open_stream()


async def test_only_exactly_that_process_is_adopted(bench, shared):
    change = msgspec.structs.replace
    other_plan = change(shared.plan, machine_id="m-other")
    own = identify(os.getpid())
    for plan, process in [
        (shared.plan, change(shared.process, start_ticks=shared.process.start_ticks + 1)),
        (shared.plan, change(shared.process, boot_id="another-boot")),
        (shared.plan, change(shared.process, pid=2**22 - 1)),
        (shared.plan, own),
        (other_plan, shared.process),
    ]:
        assert await bench.driver.adopt(plan, process) is None


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_confined_machine_without_a_device_has_no_network_of_the_host(bench, agent_of):
    plan = await bench.confined_plan()
    vmm = await bench.boot(plan)
    await agent_of(vmm).health()
    process = Path(f"/proc/{vmm.process.pid}")
    is_apart = (process / "ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    assert is_apart == (plan.confinement.uid is not None)
    if is_apart:
        devices = [line.split(":")[0].strip() for line in (process / "net/dev").read_text().splitlines()[2:]]
        assert devices == ["lo"]


async def test_kill_returns_when_the_process_is_gone(bench):
    vmm = await bench.boot()
    await vmm.kill()
    assert identify(vmm.process.pid) is None
    await vmm.kill()
    assert "killed" in await vmm.wait_exit()
    with pytest.raises(ConnectionError):
        await vmm.open_stream()
    assert await bench.driver.adopt(await bench.plan(), vmm.process) is None


async def test_an_end_from_outside_is_noticed_by_everyone_who_waits(bench):
    vmm = await bench.boot()
    waiting = [asyncio.ensure_future(vmm.wait_exit()) for _ in range(3)]
    opening = asyncio.ensure_future(vmm.open_stream())
    await asyncio.sleep(0.2)
    os.kill(vmm.process.pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        reasons = await asyncio.gather(*waiting)
        with pytest.raises(ConnectionError, match="SIGKILL"):
            await opening
    assert len(set(reasons)) == 1
    assert "SIGKILL" in reasons[0]


async def test_a_kill_for_want_of_memory_is_the_reason_also_for_a_daemon_that_did_not_start_it(bench):
    group = bench.folder / "group"
    group.mkdir()
    for name, text in (("cgroup.procs", ""), ("memory.events", "oom 1\noom_kill 1\n")):
        (group / name).write_text(text)
    plan = await bench.plan(disks=False, confinement=Confinement(cgroups=(group,)))
    first = await bench.boot(plan)
    await first.close()
    vmm = await bench.driver.adopt(plan, first.process)
    os.kill(vmm.process.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        assert await vmm.wait_exit() == "the VMM was killed because memory ran out"
    await vmm.close()
    shutil.rmtree(group)


async def test_a_cancelled_wait_harms_nobody(bench, agent_of):
    vmm = await bench.boot()
    for call in (vmm.wait_exit, vmm.open_stream):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await call()
    assert (await agent_of(vmm).health())["ok"]


async def test_a_guest_that_shuts_down_ends_the_vmm(bench, agent_of):
    vmm = await bench.boot()
    async with asyncio.timeout(BOOT_S):
        agent = agent_of(vmm)
        async with await agent.http.request("POST", "/shutdown", body=b"{}") as response:
            assert response.status == 202
        assert await vmm.wait_exit() == "the guest shut down"


#: A process that no SIGTERM ends, nor any of its children: what is ignored is inherited. Shown before it is relied on.
#: The file that it writes to keeps the disk from becoming read-only for as long as it lives.
STUBBORN = """
setsid sh -c "trap '' TERM; while :; do date; sleep 1; done" </dev/null >/root/held 2>&1 &
until [ -s /root/held ]; do sleep 0.1; done
kill -TERM $! && sleep 0.3 && kill -0 $!
"""


async def test_a_process_that_ignores_sigterm_does_not_keep_a_guest_from_its_orderly_end(bench, agent_of):
    """Nobody here kills the VMM: the guest ends that process, leaves its disk clean, and ends itself."""
    plan = await bench.plan()
    vmm = await bench.boot(plan)
    agent = agent_of(vmm)
    await agent.shell(STUBBORN)
    assert is_cleanly_left(plan.overlay, plan.overlay_format) is False
    async with asyncio.timeout(BOOT_S):
        async with await agent.http.request("POST", "/shutdown", body=b"{}") as response:
            assert response.status == 202
        assert await vmm.wait_exit() == "the guest shut down"
    assert is_cleanly_left(plan.overlay, plan.overlay_format) is True


async def test_a_kernel_panic_is_the_reason_of_the_end(bench, agent_of):
    vmm = await bench.boot()
    async with asyncio.timeout(BOOT_S):
        agent = agent_of(vmm)
        with pytest.raises(ConnectionError):
            await agent.shell("echo c > /proc/sysrq-trigger; sleep 100")
        assert "panicked: sysrq triggered crash" in await vmm.wait_exit()


async def test_an_agent_that_cannot_start_says_why_at_once(bench):
    plan = await bench.plan()
    overlay = plan.run_dir / "overlay"
    overlay.unlink()
    overlay.write_bytes(bytes(1 << 20))
    vmm = await bench.boot(msgspec.structs.replace(plan, overlay_format="raw"))
    async with asyncio.timeout(BOOT_S):
        with pytest.raises(ConnectionError, match=r"the guest agent gave up: .*overlay"):
            await vmm.open_stream()


# -- refusals ----------------------------------------------------------------------------------------------------------


async def test_a_missing_program_is_named_with_its_remedy(bench):
    with pytest.raises(VmmMissing, match="install"):
        await bench.under_test.make_missing().boot(await bench.plan())


@pytest.mark.parametrize("content", ["nothing", "noise", "half"])
async def test_a_corrupt_kernel_fails_the_boot_and_leaves_nothing(bench, content):
    real = bench.artefacts.kernel.read_bytes()
    kernel = bench.folder / "kernel"
    kernel.write_bytes({"nothing": b"", "noise": os.urandom(1 << 20), "half": real[: len(real) // 3]}[content])
    plan = await bench.plan(kernel=kernel)
    try:
        with pytest.raises(BootFailed) as caught:
            await bench.boot(plan)
        assert plan.machine_id in str(caught.value)
    finally:
        kernel.unlink()


async def test_what_a_dead_machine_left_in_its_run_directory_does_not_stop_the_next_start(bench, agent_of):
    plan = await bench.plan()
    first = await bench.boot(plan)
    kept = (plan.overlay, plan.console_log)
    files = [p for p in plan.run_dir.rglob("*") if not p.is_dir() and p not in kept]
    assert files
    await first.kill()
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"stale")
    second = await bench.boot(plan)
    assert (await agent_of(second).health())["ok"]


async def test_a_cancelled_boot_leaves_nothing(bench):
    for delay in (0.0, 0.005, 0.02):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(delay):
                await bench.driver.boot(await bench.plan())
    # A process that was being started is killed when it has.
    if starting := asyncio.all_tasks() - {asyncio.current_task()}:
        _, late = await asyncio.wait(starting, timeout=60)
        assert not late


# -- pauses ------------------------------------------------------------------------------------------------------------


async def test_a_paused_machine_stands_still_and_goes_on_where_it_was(bench, agent_of):
    """Nothing of it runs; streams of before and new ones work afterwards."""
    vmm = await bench.boot(await bench.grouped_plan())
    agent = agent_of(vmm)
    count = json.dumps({"shell": "for i in $(seq 30); do echo $i; sleep 0.1; done"}).encode()
    counting = asyncio.ensure_future(agent.http.request("POST", "/exec", body=count))
    assert (await agent.health())["ok"]
    await vmm.pause()
    await vmm.pause()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2):
            await agent_of(vmm).health()
    await vmm.resume()
    await vmm.resume()
    assert (await agent_of(vmm).health())["ok"]
    async with asyncio.timeout(BOOT_S):
        async with await counting as response:
            answer = json.loads(await response.read())
    assert base64.b64decode(answer["stdout_b64"]).split()[-1] == b"30"


async def test_a_paused_machine_stays_so_for_the_next_daemon_and_can_be_killed(bench, agent_of):
    plan = await bench.grouped_plan()
    first = await bench.boot(plan)
    await agent_of(first).health()
    await first.pause()
    await first.close()
    vmm = await bench.driver.adopt(plan, first.process)
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await agent_of(vmm).health()
        await vmm.resume()
        assert (await agent_of(vmm).health())["ok"]
        await vmm.pause()
    finally:
        await vmm.kill()
        await vmm.close()
    assert identify(first.process.pid) is None


# -- resources ---------------------------------------------------------------------------------------------------------


async def test_a_flooded_console_is_bounded_and_the_guest_goes_on(bench, agent_of):
    limit = 64 << 10
    vmm = await bench.boot(plan := await bench.plan(console_bytes=limit))
    agent = agent_of(vmm)
    async with asyncio.timeout(BOOT_S):
        await agent.shell("timeout 5 sh -c 'yes flood > /dev/ttyS0' || true")
        await agent.shell("echo last words > /dev/ttyS0")
        assert (await agent.health())["ok"]
    sizes = [p.stat().st_size for p in plan.run_dir.glob("console.log*")]
    assert limit // 4 < sum(sizes) <= limit
    async with asyncio.timeout(BOOT_S):
        while b"last words" not in plan.console_log.read_bytes():
            await asyncio.sleep(0.05)


async def idle_cpu(pid: int) -> float:
    """The part of a core that a VMM takes in some seconds, once it has come to rest: on a busy machine that is late."""
    loop = asyncio.get_running_loop()
    figures: list[float] = []
    while len(figures) < 10 and min(figures, default=1) >= IDLE_CPU:
        before, began = observe_cpu_s(pid), loop.time()
        await asyncio.sleep(IDLE_S)
        figures.append((observe_cpu_s(pid) - before) / (loop.time() - began))
    return min(figures)


async def test_a_machine_that_nobody_talks_to_uses_little_cpu(shared, under_test, workshop, record_property, agent_of):
    """Neither with a daemon that is connected, nor after that one was killed, nor after one that let go."""
    pid, figures = shared.process.pid, {}
    daemon = Daemon(under_test.name, workshop, shared.plan, shared.process, "hold")
    assert "going" in await daemon.line()
    figures["connected"] = await idle_cpu(pid)
    daemon.kill()
    figures["killed"] = await idle_cpu(pid)
    vmm = await under_test.make(workshop).adopt(shared.plan, shared.process)
    assert (await agent_of(vmm).health())["ok"]
    await vmm.close()
    figures["closed"] = await idle_cpu(pid)
    record_property("idle_cpu", figures)
    print(f"part of a core: {figures}")
    assert max(figures.values()) < IDLE_CPU, figures


async def test_several_cpus_and_odd_memory(bench, agent_of):
    vmm = await bench.boot(cpus=2, memory_mib=301)
    agent = agent_of(vmm)
    assert (await agent.shell("nproc")).strip() == "2"
    kib = int(await agent.shell("awk '/MemTotal/ {print $2}' /proc/meminfo"))
    assert 220 << 10 < kib <= 301 << 10


async def test_agent_connections_are_reused(vmm):
    client = AgentClient(vmm.open_stream)
    async with asyncio.timeout(BOOT_S):
        for _ in range(5):
            async with await client.request("GET", "/metrics") as response:
                text = (await response.read()).decode()
    await client.close()
    assert "streams" in text
