"""Processes by identity."""

import asyncio
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from fusevm.cli.install.observe import read_units
from fusevm.host import strays
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


#: What it says of the root directory of a process, with no more capabilities than it was given.
LOOK = """
import sys
from fusevm.host.process import root_of
try:
    print(root_of(int(sys.argv[1])))
except PermissionError:
    print("forbidden")
"""


def look(pid: int, capabilities: set[str]) -> str:
    bounding = ",".join(["-all", *(f"+{name}" for name in sorted(capabilities))])
    words = ["setpriv", f"--bounding-set={bounding}", "--inh-caps=-all", sys.executable, "-c", LOOK, str(pid)]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout.strip()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root looks at others")
def test_under_its_unit_the_daemon_sees_where_a_jailed_vmm_is():
    """And without the right to look, it does not take a living process for one that has gone."""
    allowed = re.findall(r"^CapabilityBoundingSet=(.*)$", read_units()["fuse-host.service"], flags=re.MULTILINE)
    unit = {name.removeprefix("CAP_").lower() for line in allowed for name in line.split()}
    root = Path("/").stat()
    with subprocess.Popen(["setpriv", "--reuid=65534", "--clear-groups", "sleep", "600"]) as other:
        try:
            while Path(f"/proc/{other.pid}").stat().st_uid != 65534:
                time.sleep(0.01)
            assert look(other.pid, unit) == str((root.st_dev, root.st_ino))
            assert look(other.pid, unit - {"sys_ptrace"}) == "forbidden"
        finally:
            other.kill()
    assert look(other.pid, unit) == "None"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EPERM])
async def test_a_process_that_cannot_be_looked_for_has_not_gone(number: int, monkeypatch: pytest.MonkeyPatch):
    def refuse(_pid: int) -> int:
        raise OSError(number, os.strerror(number))

    identity = identify(os.getpid())
    assert identity is not None
    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        ProcessHandle.find(identity)


async def test_strays_are_not_counted_while_some_may_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(_pid: int) -> None:
        raise PermissionError

    monkeypatch.setattr(strays, "root_of", refuse)
    assert await strays.find_strays(tmp_path) == {}
    (tmp_path / "m-1/jail/firecracker/m-1/root").mkdir(parents=True)
    with pytest.raises(PermissionError):
        await strays.find_strays(tmp_path)


async def test_processes_are_found_by_a_word_of_their_command_line():
    handle = ProcessHandle.of_child(start("sleep", "60.0625"))
    async with asyncio.timeout(60):
        while find_processes("60.0625") != [handle.identity]:
            await asyncio.sleep(0.01)
    assert find_processes("60.06") == []
    handle.send(signal.SIGKILL)
    await handle.wait()
    assert find_processes("60.0625") == []
