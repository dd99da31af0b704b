"""Processes by identity."""

import asyncio
import os
import signal
import subprocess

import msgspec
import pytest

from fusevm.host.process import ProcessHandle, command_line_of, identify
from fusevm.testing.processes import find_processes, observe_cpu_s


def start(*words: str) -> int:
    process = subprocess.Popen(words or ("sleep", "60"), stdin=subprocess.DEVNULL)
    process.returncode = 0  # waited for through its pidfd
    return process.pid


async def test_a_childs_end_and_status_are_seen_by_all():
    handle = ProcessHandle.of_child(start("sh", "-c", "exit 7"))
    assert await asyncio.gather(handle.wait(), handle.wait()) == [7, 7]
    assert identify(handle.identity.pid) is None
    handle.close()


async def test_a_signal_is_a_negative_status():
    handle = ProcessHandle.of_child(start())
    assert not handle.has_ended
    handle.send(signal.SIGKILL)
    assert await handle.wait() == -9
    handle.send(signal.SIGKILL)
    assert handle.has_ended
    handle.close()


async def test_has_ended_needs_no_turn_of_the_loop():
    handle = ProcessHandle.of_child(pid := start("true"))
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert handle.has_ended
    assert await handle.wait() == 0


async def test_a_process_of_another_parent_is_found_and_its_end_is_seen():
    pid = int(subprocess.run(["sh", "-c", "sleep 60 >&- 2>&- & echo $!"], capture_output=True, check=True).stdout)
    identity = identify(pid)
    handle = ProcessHandle.find(identity)
    assert handle.identity == identity
    handle.send(signal.SIGKILL)
    async with asyncio.timeout(60):
        assert await handle.wait() is None
    handle.close()


async def test_only_the_same_process_is_found():
    pid = start()
    identity = identify(pid)
    change = msgspec.structs.replace
    assert ProcessHandle.find(change(identity, start_ticks=identity.start_ticks - 1)) is None
    assert ProcessHandle.find(change(identity, boot_id="x")) is None
    assert ProcessHandle.find(change(identity, pid=2**22 - 1)) is None
    handle = ProcessHandle.find(identity)
    handle.send(signal.SIGKILL)
    await handle.wait()
    assert ProcessHandle.find(identity) is None


async def test_a_zombie_is_not_running():
    pid = start("true")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert identify(pid) is None
    os.waitpid(pid, 0)


async def test_letting_go_ends_waiting_but_not_the_process():
    handle = ProcessHandle.of_child(pid := start())
    waiting = asyncio.ensure_future(handle.wait())
    await asyncio.sleep(0)
    handle.close()
    handle.close()
    with pytest.raises(ConnectionError):
        await waiting
    again = ProcessHandle.of_child(pid)
    again.send(signal.SIGKILL)
    assert await again.wait() == -9


def test_usage_of_ourselves_and_of_nobody():
    assert 0 < observe_cpu_s(os.getpid()) < sum(os.times()[:2]) + 1
    with pytest.raises(FileNotFoundError):
        observe_cpu_s(2**22 - 1)


def test_the_command_line_of_ourselves_and_of_nobody():
    assert "pytest" in " ".join(command_line_of(os.getpid()))
    assert command_line_of(2**22 - 1) == []


async def test_processes_are_found_by_a_word_of_their_command_line():
    handle = ProcessHandle.of_child(start("sleep", "60.0625"))
    async with asyncio.timeout(60):
        while find_processes("60.0625") != [handle.identity]:
            await asyncio.sleep(0.01)
    assert find_processes("60.06") == []
    handle.send(signal.SIGKILL)
    await handle.wait()
    assert find_processes("60.0625") == []
