"""The door to subprocesses: output, failure messages, and that nothing outlives the call."""

import asyncio
import os
from pathlib import Path

import pytest
import uvloop

from fusevm.host.run import ToolMissing, command_line, program_environment, run, run_streaming
from fusevm.model.errors import CommandFailed, Timeout


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


async def gone(pid: int) -> bool:
    """Wait until a killed process has left, which the kernel does in its own time."""
    for _ in range(6000):
        if not is_running(pid):
            return True
        await asyncio.sleep(0.01)
    return False


async def test_output_and_input():
    done = await run(["sh", "-c", "cat; echo err >&2"], stdin=b"hello", timeout_s=10)
    assert (done.stdout, done.stderr, done.returncode) == (b"hello", b"err\n", 0)


async def test_without_input_it_reads_nothing():
    assert (await run(["cat"], timeout_s=10)).stdout == b""


async def test_a_megabyte_of_input_that_nobody_reads_is_no_failure():
    assert (await run(["true"], stdin=bytes(1 << 20), timeout_s=10)).returncode == 0


async def test_a_failure_carries_a_command_line_to_paste_the_status_and_the_last_words(tmp_path):
    with pytest.raises(CommandFailed) as caught:
        await run(["sh", "-c", "echo no such luck >&2; exit 3"], timeout_s=10, cwd=tmp_path, env={"A": "b c"})
    assert caught.value.command == f"cd {tmp_path} && A='b c' sh -c 'echo no such luck >&2; exit 3'"
    assert caught.value.exit_status == 3
    assert caught.value.stderr == "no such luck"


async def test_an_unchecked_failure_is_a_result():
    assert (await run(["sh", "-c", "exit 3"], timeout_s=10, check=False)).returncode == 3


async def test_a_missing_program_is_named_with_its_package():
    with pytest.raises(ToolMissing, match="apt-get install nftables"):
        await run(["nft"], timeout_s=10, env={"PATH": "/nowhere"})


async def test_a_program_that_takes_too_long_is_killed_with_its_children(tmp_path):
    pidfile = tmp_path / "pid"
    for timeout_s in (0.5, 5, 50):  # until it is long enough for this machine to start the children
        with pytest.raises(Timeout, match="sleep 600"):
            await run(["sh", "-c", f"sleep 600 & echo $! >{pidfile}; wait"], timeout_s=timeout_s)
        if pidfile.exists() and pidfile.read_text():
            break
    assert await gone(int(pidfile.read_text()))


async def test_a_cancelled_call_leaves_no_process(tmp_path):
    pidfile = tmp_path / "pid"
    task = asyncio.create_task(
        run(["sh", "-c", f"echo $$ >{pidfile}.new; mv {pidfile}.new {pidfile}; sleep 600"], timeout_s=600)
    )
    while not pidfile.exists():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(f"/proc/{pidfile.read_text().strip()}").exists()


async def test_a_call_that_is_cancelled_while_its_program_starts_leaves_no_process():
    """asyncio itself neither ends the program's children then nor ever returns."""
    before = children()
    task = asyncio.create_task(run(["sh", "-c", "sleep 600 & wait"], timeout_s=600))
    # This task has a turn between the fork and the end of the start, which takes several.
    while not (started := children() - before):
        assert not task.done()
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (pid,) = started
    async with asyncio.timeout(60):
        while is_group(pid):
            await asyncio.sleep(0.01)


def is_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def children() -> set[int]:
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return {int(pid) for line in lists for pid in line.split()}


async def test_lines_come_one_by_one_and_a_carriage_return_ends_one():
    lines = []
    done = await run_streaming(["printf", r"one\ntwo 1%%\rtwo 2%%\rlast"], on_line=lines.append, timeout_s=10)
    assert lines == ["one", "two 1%", "two 2%", "last"]
    assert done.stdout == b"one\ntwo 1%\rtwo 2%\rlast"


async def test_an_exception_of_the_callback_ends_the_program_and_is_raised():
    def refuse(line: str) -> None:
        raise KeyError(line)

    with pytest.raises(KeyError, match="x"):
        await run_streaming(["sh", "-c", "echo x; sleep 600"], on_line=refuse, timeout_s=600)


async def test_endless_output_is_cut_off():
    with pytest.raises(CommandFailed, match="more than 1000000 bytes"):
        await run(["yes"], timeout_s=60, max_output_bytes=1_000_000)


def test_tokens_of_the_daemon_do_not_reach_programs(monkeypatch):
    monkeypatch.setenv("ORCH_AUTH_TOKEN", "secret")
    monkeypatch.setenv("PATH", "/opt/bin")
    env = program_environment({"X": "y"})
    assert "ORCH_AUTH_TOKEN" not in env
    assert env["X"] == "y"
    assert env["PATH"].split(":")[0] == "/opt/bin"
    assert "/usr/sbin" in env["PATH"].split(":")


def test_a_command_line_is_quoted():
    assert command_line(["echo", "a b", "$x"]) == "echo 'a b' '$x'"


async def test_descriptors_are_passed_when_asked():
    read, write = os.pipe()
    try:
        await run(["sh", "-c", f"echo hi >/dev/fd/{write}"], timeout_s=10, pass_fds=[write])
        assert os.read(read, 10) == b"hi\n"
    finally:
        os.close(read)
        os.close(write)


def test_the_same_holds_on_uvloop():
    """The daemons run on uvloop, whose transports differ in small ways."""

    async def scenario() -> None:
        assert (await run(["cat"], stdin=b"hello", timeout_s=10)).stdout == b"hello"
        assert (await run(["true"], stdin=bytes(1 << 20), timeout_s=10)).returncode == 0
        with pytest.raises(Timeout):
            await run(["sh", "-c", "sleep 60 & wait"], timeout_s=0.2)
        with pytest.raises(CommandFailed, match="killed"):
            await run(["yes"], timeout_s=60, max_output_bytes=1_000_000)
        lines: list[str] = []
        await run_streaming(["printf", r"one\ntwo"], on_line=lines.append, timeout_s=10)
        assert lines == ["one", "two"]

    uvloop.run(scenario())
