"""Real machines whose daemon is restarted or killed, whose VMM is killed, whose guest misbehaves; nothing is left."""

import asyncio
import json
import os
import signal
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from real_host import Guest, Host, make_fence, reason_of, until

from fusevm.host.process import command_line_of
from fusevm.model.errors import BootFailed
from fusevm.model.machine import Moment
from fusevm.wire.frames import FrameType
from fusevm.wire.guest import ExecRequest, Process
from fusevm.wire.host_api import HostFacts, MachineEvent

pytestmark = pytest.mark.real

FENCE = make_fence()


def vmm_pid(host: Host, machine_id: str) -> int:
    """The VMM's pid as this test sees it."""
    marker = f"{host.data}/machines/{machine_id}/"
    for folder in Path("/proc").glob("[0-9]*"):
        words = command_line_of(int(folder.name))
        if words and "qemu" in words[0] and any(marker in word for word in words):
            return int(folder.name)
    raise AssertionError(f"{machine_id} has no VMM")


async def test_the_life_of_a_machine_across_daemons(host: Host):
    """Create, work, restart in order, restart after a crash, stop, start, delete: nothing is lost, nothing is left."""
    await host.start()
    await host.create("m-1", FENCE)
    guest = Guest(host, "m-1", FENCE)
    await guest.shell("echo kept > /kept && sync")
    request = ExecRequest(shell="n=0; while sleep 0.2; do n=$((n+1)); echo $n; done")
    process = msgspec.json.decode(await guest.ask("POST", "/processes", msgspec.json.encode(request)), type=Process)
    pid, epoch = vmm_pid(host, "m-1"), await _epoch(host)

    assert await host.stop() == 0
    await host.start()
    assert await _epoch(host) != epoch
    assert vmm_pid(host, "m-1") == pid
    assert (await host.machine("m-1")).phase == "running"
    assert await guest.shell("cat /kept") == "kept\n"
    await _grows(guest, process.pid)

    async with guest.frames("sh", tty=True) as terminal:
        await terminal.send(FrameType.STDIN, b"echo he''re\n")
        await terminal.read_until(b"here\r\n")
        await host.kill()
    await host.start()
    assert vmm_pid(host, "m-1") == pid
    await _grows(guest, process.pid)
    repeated = await host.create("m-1", FENCE)
    assert (repeated.phase, repeated.generation) == ("running", 1)

    await host.ask("POST", "/machines/m-1/stop", make_fence(action_seq=2))
    await until(lambda: all(line.startswith("machine directory") for line in host.leftovers()))
    await host.ask("POST", "/machines/m-1/start", make_fence(action_seq=3))
    assert await guest.shell("cat /kept") == "kept\n"
    assert (await host.machine("m-1")).generation == 2

    await host.delete("m-1", make_fence(action_seq=4))
    assert await reason_of(host.create("m-1", make_fence(action_seq=5))) == "stale_incarnation"
    assert await host.stop() == 0


async def _epoch(host: Host) -> str:
    return msgspec.json.decode(await host.ask("GET", "/info"), type=HostFacts).epoch


async def _grows(guest: Guest, pid: int) -> None:
    """The background process writes on."""

    async def end() -> int:
        process = msgspec.json.decode(await guest.ask("GET", f"/processes/{pid}"), type=Process)
        return process.output.stdout.end

    before = await end()

    async def has_grown() -> bool:
        return await end() > before

    await until(has_grown)


async def test_a_vmm_that_is_killed_is_noticed_at_once(host: Host):
    await host.start()
    await host.create("m-1", FENCE)
    guest = Guest(host, "m-1", FENCE)
    async with host.exchange("GET", "/events") as response, guest.frames("sleep", "1000") as terminal:
        lines = _lines(response)
        assert (await anext(lines)).kind == "hello"
        os.kill(vmm_pid(host, "m-1"), signal.SIGKILL)
        async with asyncio.timeout(60):
            event = await anext(lines)
        assert (event.phase, event.machine_id, "SIGKILL" in event.error) == ("failed", "m-1", True)
        frames = [frame async for frame in _frames(terminal)]
        assert json.loads(frames[-1].payload)["details"]["reason"] == "guest_unreachable"
    assert await reason_of(guest.exec("true")) == "wrong_state"
    await until(lambda: all(line.startswith("machine directory") for line in host.leftovers()))
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0


async def _frames(terminal):
    while True:
        frame = await terminal.receive()
        yield frame
        if frame.type in (FrameType.ERROR, FrameType.EXIT):
            return


async def _lines(response):
    rest = b""
    async for chunk in response.chunks():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line, type=MachineEvent)


async def test_what_happened_while_no_daemon_ran_is_told_afterwards(host: Host):
    """A VMM that died meanwhile is a failed machine; one that an overtaken journal no longer knows is swept."""
    await host.start()
    await host.create("m-1", FENCE)
    await host.kill()
    os.kill(vmm_pid(host, "m-1"), signal.SIGKILL)
    await host.start()

    async def has_failed() -> bool:
        return (await host.machine("m-1")).phase == "failed"

    await until(has_failed)
    assert "while the daemon was away" in (await host.machine("m-1")).error
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0


async def test_a_guest_that_shuts_down_while_no_daemon_runs_is_known_by_its_disk(host: Host):
    """Nobody has seen its VMM end; but its disks were made read-only before, as a shutdown does."""
    await host.start()
    await host.create("m-1", FENCE)
    end = "sleep 6; for key in s u; do echo $key > /proc/sysrq-trigger; sleep 2; done; echo b > /proc/sysrq-trigger"
    await Guest(host, "m-1", FENCE).shell(f"setsid sh -c '{end}' >/dev/null 2>&1 </dev/null &")
    await host.kill()
    await until(lambda: not any(line.startswith("process") for line in host.leftovers()))
    await host.start()

    async def is_over() -> bool:
        return (await host.machine("m-1")).phase != "running"

    await until(is_over)
    machine = await host.machine("m-1")
    assert (machine.phase, machine.error) == ("stopped", "the guest shut down while the daemon was away")
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0


async def test_a_guest_that_powers_off_is_stopped(host: Host):
    await host.start()
    await host.create("m-1", FENCE)
    guest = Guest(host, "m-1", FENCE)
    await guest.ask("POST", "/shutdown", b"{}")

    async def has_stopped() -> bool:
        return (await host.machine("m-1")).phase == "stopped"

    await until(has_stopped)
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0


async def test_a_guest_that_floods_its_console_disturbs_nobody(host: Host):
    await host.start("--console-bytes", str(256 << 10))
    await host.create("m-1", FENCE)
    guest = Guest(host, "m-1", FENCE)
    request = ExecRequest(shell="yes flood > /dev/ttyS0")
    await guest.ask("POST", "/processes", msgspec.json.encode(request))

    def sizes() -> list[int]:
        return [path.stat().st_size for path in (host.data / "machines/m-1").glob("console.log*")]

    await until(lambda: len(sizes()) == 2, 60)
    assert (await guest.exec("echo", "alive")).exit_code == 0
    assert sum(sizes()) <= 256 << 10
    tail = await host.ask("GET", "/machines/m-1/logs?tail_bytes=1000", FENCE)
    assert b"flood" in tail
    async with asyncio.timeout(60):
        assert (await host.call("GET", "/health"))[0] == 200
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0


async def test_a_delete_does_not_wait_for_a_boot(host: Host):
    await host.start()
    creating = asyncio.create_task(reason_of(host.create("m-1", FENCE)))
    await until(lambda: any(line.startswith("process") for line in host.leftovers()))
    async with asyncio.timeout(60):
        await host.delete("m-1", make_fence(action_seq=2))
    assert await creating == "stale_incarnation"
    assert await host.machines() == []
    assert await host.stop() == 0


async def test_a_create_whose_client_goes_away_goes_on(host: Host):
    await host.start()
    creating = asyncio.create_task(host.create("m-1", FENCE))
    await until(lambda: any(line.startswith("process") for line in host.leftovers()))
    creating.cancel()

    async def runs() -> bool:
        return [machine.phase for machine in await host.machines()] == ["running"]

    await until(runs, 120)
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0


async def test_a_boot_that_fails_tells_the_consoles_last_words(host: Host):
    """A disk that the guest itself has ruined keeps the agent from starting; it says so, and so does the error."""
    await host.start()
    await host.create("m-1", FENCE)
    await host.ask("POST", "/machines/m-1/stop", FENCE)
    (disk,) = (host.data / "machines/m-1").glob("overlay.*")
    size = disk.stat().st_size
    with disk.open("r+b") as file:
        file.write(b"\0" * min(size, 64 << 20))
    with pytest.raises(BootFailed, match="overlay"):
        await host.ask("POST", "/machines/m-1/start", FENCE)
    machine = await host.machine("m-1")
    assert (machine.phase, "overlay" in machine.error) == ("failed", True)
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0


async def test_a_boot_that_takes_too_long_is_undone(host: Host):
    await host.start()
    with pytest.raises(BootFailed, match=r"did not answer within 1 s|did not start in time"):
        await host.create("m-1", FENCE, boot_timeout_ms=300)
    assert await host.machines() == []
    assert await host.stop() == 0


async def test_an_order_that_a_standstill_made_late_is_not_carried_out(host: Host):
    await host.start()
    now = msgspec.json.decode(await host.ask("GET", "/info"), type=HostFacts).clock
    late = replace(FENCE, valid_until=Moment(clock=now.clock, ms=now.ms + 500))
    os.kill(host.daemon_pid, signal.SIGSTOP)
    creating = asyncio.create_task(reason_of(host.create("m-1", late)))
    await asyncio.sleep(0.6)
    for pid in (host.daemon_pid, host._daemon.pid):  # nsenter stops with its child
        os.kill(pid, signal.SIGCONT)
    assert await creating == "order_expired"
    assert await reason_of(host.delete("m-1", late)) == "order_expired"
    assert await host.machines() == []
    assert await host.stop() == 0


async def test_a_second_daemon_on_the_same_directory_is_refused(host: Host):
    await host.start()
    first = host._daemon
    host.launch()
    assert await host.wait_end() == 4
    assert "in use by another process" in host.tail()
    host._daemon = first
    assert await host.stop() == 0
