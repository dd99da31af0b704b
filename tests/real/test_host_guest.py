"""Commands, files and terminals in one real machine that all tests of this file share, through the host's API."""

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator
from urllib.parse import quote

import msgspec
import pytest
from real_host import until

from fusevm.model.errors import CommandNotFound
from fusevm.wire.frames import FrameType
from fusevm.wire.guest import AgentHealth, ExecRequest, Process
from fusevm.wire.host_api import HostExecAnswer, HostFacts, StorageAnswer

pytestmark = pytest.mark.real

MIB = 1 << 20


# -- the machine -----------------------------------------------------------------------------------------------------


async def test_the_machine_is_what_was_asked_for(guest):
    machine = await guest.host.machine("m-shared")
    assert (machine.phase, machine.driver, machine.isolation) == ("running", "qemu", "namespace")
    assert machine.address.startswith("10.210.")
    timings = machine.timings
    assert 0 < timings.prepare_ms < timings.boot_ms
    assert timings.host_ms == pytest.approx(timings.prepare_ms + timings.boot_ms + timings.agent_ms, abs=50)
    print(f"timings: {timings}")
    assert (await guest.shell("hostname")).strip() == "box"
    assert (await guest.shell("echo $COLOUR")).strip() == "blue"
    assert int(await guest.shell("nproc")) == 1
    memory_kib = int((await guest.shell("grep MemTotal /proc/meminfo")).split()[1])
    assert 200 << 10 < memory_kib <= 256 << 10
    size = int((await guest.shell("df --output=size -B1 / | tail -1")).strip())
    assert 0.9 * (1 << 30) < size <= 1 << 30


async def test_the_guest_knows_the_time(guest):
    before = time.time_ns()
    health = msgspec.json.decode(await guest.ask("GET", "/health"), type=AgentHealth)
    after = time.time_ns()
    assert before - 5_000_000_000 < health.time_unix_ns < after + 5_000_000_000


async def test_the_host_knows_what_it_has(guest):
    facts = msgspec.json.decode(await guest.host.ask("GET", "/info"), type=HostFacts)
    assert (facts.cluster, facts.reserved.vm_count) == ("test", 1)
    assert "debian-12" in facts.images
    assert facts.kernel.startswith("6.")
    report = msgspec.json.decode(await guest.host.ask("GET", "/storage/report"), type=StorageAnswer).report
    (machine,) = report.machines
    # A sparse disk of 1 GiB takes what was written.
    assert 0 < machine.system_bytes < 512 * MIB


async def test_the_console_can_be_read(guest):
    assert isinstance(await guest.host.ask("GET", "/machines/m-shared/logs?tail_bytes=1000", guest.fence), bytes)


async def test_the_vmm_runs_as_a_user_of_its_own(guest):
    line = next(
        line for line in guest.host.box.run("ps", "-ww", "-eo", "uid=,args=").splitlines() if "m-shared" in line
    )
    assert int(line.split()[0]) >= 200_000


# -- exec ------------------------------------------------------------------------------------------------------------


async def test_output_errors_and_exit_codes(guest):
    result = await guest.exec("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.exit_code, result.stdout_b64, result.stderr_b64) == (7, "b3V0Cg==", "ZXJyCg==")


async def test_the_contracts_exec(guest):
    body = {"command": ["sh", "-c", "echo $A; pwd; id -u"], "env": {"A": "x"}, "cwd": "/tmp", "user": "1000"}
    answer = await guest.host.ask("POST", "/machines/m-shared/exec", guest.fence, json.dumps(body).encode())
    assert msgspec.json.decode(answer, type=HostExecAnswer).stdout == "x\n/tmp\n1000\n"


async def test_stdin_is_read_to_its_end(guest):
    data = bytes(range(256)) * 4096
    result = await guest.exec("sha256sum", stdin=data)
    assert base64.b64decode(result.stdout_b64).split()[0].decode() == hashlib.sha256(data).hexdigest()


async def test_a_command_that_takes_too_long_is_killed(guest):
    result = await guest.exec("sh", "-c", "sleep 3000 & sleep 3000", timeout_ms=700)
    assert (result.exit_code, result.timed_out) == (124, True)
    assert "sleep 3000" not in await guest.shell("ps -eo args || cat /proc/[0-9]*/cmdline")


async def test_twenty_mebibytes_are_cut_at_sixteen_and_counted(guest):
    result = await guest.exec("head", "-c", str(20 * MIB), "/dev/zero")
    assert (result.truncated.stdout, result.total.stdout) == (True, 20 * MIB)
    assert len(result.stdout_b64) == -(-16 * MIB // 3) * 4


async def test_bytes_that_are_no_text_come_through(guest):
    result = await guest.exec("printf", r"\377\376\000x")
    assert result.stdout_b64 == "//4AeA=="
    body = json.dumps({"command": ["printf", r"\377x"]}).encode()
    answer = await guest.host.ask("POST", "/machines/m-shared/exec", guest.fence, body)
    assert json.loads(answer)["stdout"] == "\ufffdx"


async def test_a_program_that_does_not_exist_says_so(guest):
    with pytest.raises(CommandNotFound):
        await guest.exec("no-such-program")


async def test_many_commands_at_once(guest):
    results = await asyncio.gather(*(guest.exec("sh", "-c", f"sleep 0.2; echo {n}") for n in range(12)))
    assert [result.exit_code for result in results] == [0] * 12
    assert len({result.stdout_b64 for result in results}) == 12


# -- files -----------------------------------------------------------------------------------------------------------


async def _pattern(size: int) -> AsyncIterator[bytes]:
    chunk = bytes(range(256)) * 256
    for start in range(0, size, len(chunk)):
        yield chunk[: min(len(chunk), size - start)]


@pytest.mark.parametrize(
    ("size", "name"),
    [(0, "/data/empty"), (1, "/data/one"), (3 * MIB + 17, "/data/a b/ä ö/名.bin"), (100 * MIB, "/data/large")],
)
async def test_files_come_back_as_they_went(guest, size: int, name: str):
    digest = hashlib.sha256()
    async for chunk in _pattern(size):
        digest.update(chunk)
    target = f"/files?path={quote(name)}"
    written = json.loads(await guest.ask("PUT", f"{target}&mkdirs=true", _pattern(size)))
    assert written == {"path": name, "size_bytes": size, "sha256": digest.hexdigest()}
    received = hashlib.sha256()
    async with guest.host.exchange("GET", guest.path(target), guest.fence) as response:
        assert response.headers["content-length"] == str(size)
        async for chunk in response.chunks():
            received.update(chunk)
    assert received.digest() == digest.digest()
    entry = json.loads(await guest.ask("POST", "/files?op=stat", json.dumps({"path": name}).encode()))
    assert (entry["type"], entry["size_bytes"]) == ("file", size)
    await guest.ask("DELETE", target)
    async with guest.host.exchange("HEAD", guest.path(target), guest.fence) as response:
        assert response.status == 404


async def test_an_upload_that_breaks_off_leaves_nothing(guest):
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * MIB
        raise ZeroDivisionError("the client gives up")

    with pytest.raises(ZeroDivisionError):
        await guest.host.call("PUT", guest.path("/files?path=/data/cut&mkdirs=true"), guest.fence, broken())
    listing = json.loads(await guest.ask("POST", "/files?op=list", b'{"path":"/data"}'))
    assert "cut" not in [entry["name"] for entry in listing["entries"]]


async def test_a_part_of_a_file(guest):
    await guest.ask("PUT", "/files?path=/tmp/part", b"0123456789")
    target, headers = guest.path("/files?path=/tmp/part"), {"range": "bytes=3-5"}
    assert await guest.host.call("GET", target, guest.fence, headers=headers) == (206, b"345")


async def test_archives_go_both_ways(guest):
    await guest.shell("mkdir -p /tmp/copy /tmp/tree/sub && echo a > /tmp/tree/one && ln -s one /tmp/tree/sub/link")
    tar = await guest.ask("GET", "/archive?path=/tmp/tree")
    assert json.loads(await guest.ask("PUT", "/archive?path=/tmp/copy", tar))["entries"] >= 3
    assert (await guest.shell("readlink /tmp/copy/tree/sub/link")).strip() == "one"


# -- terminals and processes -----------------------------------------------------------------------------------------


async def test_a_terminal_is_one(guest):
    async with guest.frames("sh", tty=True, rows=33, cols=101) as terminal:
        await terminal.send(FrameType.STDIN, b"stty size; test -t 0 && echo is-a-t''ty\n")
        await terminal.read_until(b"33 101")
        await terminal.read_until(b"is-a-tty")
        await terminal.send(FrameType.RESIZE, b'{"rows":40,"cols":120}')
        await terminal.send(FrameType.STDIN, b"stty size\n")
        await terminal.read_until(b"40 120")
        # The word comes from the foreground process itself: a signal in the shell's fork would be the shell's.
        await terminal.send(FrameType.STDIN, b"sh -c 'echo asl\"\"eep; exec sleep 100'\n")
        await terminal.read_until(b"asleep\r\n")
        await terminal.send(FrameType.SIGNAL, b'{"signal":"INT"}')
        await terminal.send(FrameType.STDIN, b"exit 5\n")
        assert (await terminal.exit()).exit_code == 5


async def test_a_pipe_is_one(guest):
    async with guest.frames("sh", "-c", "cat; echo done >&2; exit 3") as terminal:
        await terminal.send(FrameType.STDIN, b"hello ")
        await terminal.read_until(b"hello")
        await terminal.send(FrameType.STDIN_EOF)
        assert (await terminal.exit()).exit_code == 3
    assert terminal.output == b"hello done\n"


async def test_a_client_that_hangs_up_ends_its_command(guest):
    async with guest.frames("sh", "-c", "echo $$; exec sleep 4321") as terminal:
        await terminal.read_until(b"\n")
    pid = int(terminal.output)
    async with asyncio.timeout(120):
        while await _is_alive(guest, pid):
            await asyncio.sleep(0.2)


async def _is_alive(guest, pid: int) -> bool:
    return (await guest.exec("test", "-d", f"/proc/{pid}")).exit_code == 0


async def test_a_background_process_goes_on_and_can_be_found_again(guest):
    request = ExecRequest(shell="for n in 1 2 3; do echo $n; done; read line; echo got $line; exit 4", stdin=True)
    started = msgspec.json.decode(await guest.ask("POST", "/processes", msgspec.json.encode(request)), type=Process)
    assert started.state == "running"
    await guest.ask("POST", f"/processes/{started.pid}/stdin?eof=true", b"it\n")
    await until(lambda: _has_exited(guest, started.pid))
    output = await guest.ask("GET", f"/processes/{started.pid}/output?stream=stdout&offset=2&follow=true")
    assert output == b"2\n3\ngot it\n"
    ended = msgspec.json.decode(await guest.ask("GET", f"/processes/{started.pid}"), type=Process)
    assert (ended.state, ended.exit and ended.exit.exit_code) == ("exited", 4)


async def _has_exited(guest, pid: int) -> bool:
    return msgspec.json.decode(await guest.ask("GET", f"/processes/{pid}"), type=Process).state == "exited"


async def test_a_reader_that_waits_does_not_keep_others_waiting(guest):
    """A client that does not read its endless answer holds up neither commands nor files of the same machine."""
    request = ExecRequest(shell="exec cat /dev/zero")
    started = msgspec.json.decode(await guest.ask("POST", "/processes", msgspec.json.encode(request)), type=Process)
    target = guest.path(f"/processes/{started.pid}/output?stream=stdout&follow=true")
    async with guest.host.exchange("GET", target, guest.fence):
        for _ in range(3):
            assert (await guest.exec("true")).exit_code == 0
    await guest.ask("POST", f"/processes/{started.pid}/signal", b'{"signal":"KILL"}')
