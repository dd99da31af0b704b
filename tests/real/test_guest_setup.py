"""Setup, keyed processes, the user's daemon and the health check in one real machine, through the host's relay."""

import asyncio
import base64
import hashlib
import json
import mmap
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from real_host import Guest, Host, make_fence, until

from fusevm.model.errors import BadPath, NoSpaceInGuest
from fusevm.model.setup import AGENT_PATH, AgentState, Healthcheck, HttpCheck, SetupFile, Verdict
from fusevm.wire.guest import AgentOrder, DrainAnswer, DrainOrder, ExecRequest, GuestState, Process, SetupBody

pytestmark = pytest.mark.real

T = TypeVar("T")
FENCE = make_fence("setup")
PATIENCE_S = 120.0

#: Answers every request on a port of loopback with the content of a file.
SITE = r"""
use IO::Socket::INET;
my ($port, $path) = @ARGV;
my $site = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => $port, Listen => 5, ReuseAddr => 1) or die $!;
$| = 1;
print "serving\n";
while (my $client = $site->accept) {
    while (<$client>) { last if /^\r?$/ }
    if (open(my $file, "<", $path)) {
        local $/;
        my $body = <$file>;
        print $client "HTTP/1.1 200 OK\r\nContent-Length: " . length($body) . "\r\n\r\n" . $body;
    } else {
        print $client "HTTP/1.1 503 Sick\r\nContent-Length: 0\r\n\r\n";
    }
    close $client;
}
"""


class Machine(Guest):
    """A guest, and what these tests ask of it."""

    async def send(self, method: str, target: str, kind: type[T], body: Any = None) -> T:
        encoded = msgspec.json.encode(body) if body is not None else None
        return msgspec.json.decode(await self.ask(method, target, encoded), type=kind)

    async def put_setup(self, body: SetupBody) -> GuestState:
        return await self.send("PUT", "/setup", GuestState, body)

    async def start_daemon(self, order: AgentOrder) -> GuestState:
        """Begin an order and wait until it runs."""
        await self.send("PUT", "/agent", GuestState, order)
        return await self.await_state(
            lambda seen: (
                seen.agent_id == order.id and seen.agent is not None and seen.agent.state is not AgentState.STARTING
            )
        )

    async def await_state(self, holds: Callable[[GuestState], bool]) -> GuestState:
        """Wait by the long poll until the state is what is wanted."""
        async with asyncio.timeout(PATIENCE_S):
            state = await self.send("GET", "/state", GuestState)
            while not holds(state):
                state = await self.send("GET", f"/state?after={state.version}&wait_ms=20000", GuestState)
            return state

    async def await_verdict(self, verdict: Verdict) -> GuestState:
        return await self.await_state(lambda seen: seen.health is not None and seen.health.state is verdict)

    async def start(self, key: str, *cmd: str) -> Process:
        request = ExecRequest(cmd=list(cmd), key=key)
        return await self.send("POST", "/processes", Process, request)

    async def output(self, target: str) -> str:
        return (await self.ask("GET", target)).decode()

    async def serve(self, port: int, path: str) -> None:
        """Start a web site in the guest that answers with a file."""
        key = f"site-{port}"
        await self.start(key, "perl", "-e", SITE, str(port), path)
        await until(lambda: self.says(f"/processes/@{key}/output", "serving"), PATIENCE_S)

    async def says(self, target: str, text: str) -> bool:
        return text in await self.output(target)


def file(content: str, mode: str = "0600") -> SetupFile:
    return SetupFile(content_b64=base64.b64encode(content.encode()).decode(), mode=mode)


def disk_of(host: Host, machine_id: str) -> Path:
    (disk,) = (host.data / "machines" / machine_id).glob("overlay.*")
    return disk


def holds_bytes(path: Path, needle: bytes) -> bool:
    with path.open("rb") as disk, mmap.mmap(disk.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(needle) >= 0


@pytest.fixture(scope="module")
def machine(guest: Guest) -> Iterator[Machine]:
    """A running machine of this file's own, on the host of the one that all files share."""
    asyncio.run(guest.host.create("m-setup", FENCE))
    yield Machine(guest.host, "m-setup", FENCE)
    asyncio.run(guest.host.delete("m-setup", FENCE))


@pytest.fixture
async def without_duties(machine: Machine) -> AsyncIterator[None]:
    """Leave no daemon and no health check to the next test."""
    yield
    await machine.ask("DELETE", "/healthcheck")
    await machine.ask("POST", "/agent/drain", msgspec.json.encode(DrainOrder(timeout_ms=30_000)))


# -- setup -----------------------------------------------------------------------------------------------------------


async def test_secrets_are_in_memory_and_not_on_the_disk(machine: Machine):
    secret, plain = secrets.token_hex(24), secrets.token_hex(24)
    state = await machine.put_setup(
        SetupBody(
            id="disk/1",
            fuse={"secrets.json": file(json.dumps({"KEY": secret})), "deep/auth-token": file(secret)},
            files={"/workspace/plain": file(plain, "0640")},
            env={"SECRET_OF_ALL": f"env-{secret}"},
            workdir="/workspace/here",
        )
    )
    assert state.setup_id == "disk/1"
    assert secret in await machine.shell("cat /fuse/secrets.json /fuse/deep/auth-token")
    assert (await machine.shell("echo $SECRET_OF_ALL; pwd")).split() == [f"env-{secret}", "/workspace/here"]
    assert (await machine.shell("stat -c %a:%u:%F /fuse /fuse/secrets.json /fuse/deep /workspace/plain")).split(
        "\n"
    ) == [
        "700:0:directory",
        "600:0:regular file",
        "700:0:directory",
        "640:0:regular file",
        "",
    ]
    (mount,) = (line for line in (await machine.shell("cat /proc/mounts")).splitlines() if " /fuse " in line)
    kind, options = mount.split()[2:4]
    assert kind == "tmpfs"
    assert {"nosuid", "nodev"} <= set(options.split(","))
    assert "noexec" not in options
    denied = await machine.exec("cat", "/fuse/secrets.json", user="1000")
    assert denied.exit_code != 0

    await machine.shell("sync")
    disk = disk_of(machine.host, "m-setup")
    assert holds_bytes(disk, plain.encode())  # so that a secret would be found
    assert not holds_bytes(disk, secret.encode())


async def test_the_folder_of_secrets_is_bounded_and_out_of_reach_of_files(machine: Machine):
    await machine.shell("ln -sfn /fuse /to-secrets")
    for path in ("/fuse/x", "/to-secrets/x", "/proc/sys/x", "/dev/null"):
        with pytest.raises(BadPath):
            await machine.put_setup(SetupBody(id="reach", files={path: file("x")}))
    # A machine of 256 MiB has less than 128 MiB for secrets.
    filled = await machine.exec("sh", "-c", "head -c 130M /dev/zero > /fuse/filled")
    assert b"No space left" in base64.b64decode(filled.stderr_b64)
    with pytest.raises(NoSpaceInGuest, match="memory"):
        await machine.put_setup(SetupBody(id="full", fuse={"more": file("x" * 10_000)}))
    await machine.shell("rm /fuse/filled")
    assert (await machine.put_setup(SetupBody(id="full", fuse={"more": file("x" * 10_000)}))).setup_id == "full"


async def test_a_process_with_a_key_runs_once(machine: Machine):
    command = ("sh", "-c", "echo ran >> /ran; echo output; echo trouble >&2; exit 5")
    first = await machine.start("startup", *command)
    assert await machine.output("/processes/@startup/output?offset=0&follow=true") == "output\n"
    again = await machine.start("startup", *command)
    assert (again.pid, again.key, again.state) == (first.pid, "startup", "exited")
    assert again.exit is not None
    assert again.exit.exit_code == 5
    assert await machine.output(f"/processes/{first.pid}/output?stream=stderr&offset=4") == "ble\n"
    assert await machine.shell("cat /ran") == "ran\n"


# -- the daemon ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_duties")
async def test_a_downloaded_daemon_is_supervised_and_drained(machine: Machine):
    program = "#!/bin/sh\necho $$\nsleep 1000000 &\ntrap 'echo term; exit 7' TERM\nwhile :; do sleep 0.1; done\n"
    await machine.put_setup(SetupBody(id="daemon", files={"/site/daemon": file(program, "0644")}))
    await machine.serve(8099, "/site/daemon")
    digest = hashlib.sha256(program.encode()).hexdigest()
    order = AgentOrder(
        id="supervised",
        download_url="http://127.0.0.1:8099/daemon",
        sha256=digest,
        drain_command=["sh", "-c", "echo draining"],
    )
    state = await machine.start_daemon(order)
    assert state.agent is not None
    assert (state.agent.state, state.agent.restarts) == (AgentState.RUNNING, 0)
    assert (await machine.shell(f"stat -c %a {AGENT_PATH}; sha256sum {AGENT_PATH}")).split()[:2] == ["700", digest]
    assert (await machine.send("PUT", "/agent", GuestState, order)).version == state.version

    pid = await _number_of_daemon(machine, 0)
    cgroup, session = (await machine.shell(f"cat /proc/{pid}/cgroup; ps -o sid= -p {pid}")).split()
    assert cgroup.startswith("0::/user/c")
    assert session == pid
    await machine.shell(f"kill -9 {pid}")
    state = await machine.await_state(lambda seen: seen.agent.restarts == 1 and seen.agent.state is AgentState.RUNNING)
    assert state.agent.exit_code == 137
    second = await _number_of_daemon(machine, 1)
    assert second != pid
    # What the killed one had left behind is gone, too.
    assert (await machine.shell("pgrep -c -x -f 'sleep 1000000' || true")).strip() == "1"

    answer = await machine.send("POST", "/agent/drain", DrainAnswer, DrainOrder(timeout_ms=60_000))
    assert (answer.exit_code, answer.message) == (7, "")
    assert (await machine.output("/agent/output?offset=0&follow=true")).split() == [pid, second, "draining", "term"]
    state = await machine.send("GET", "/state", GuestState)
    assert state.agent.state is AgentState.DRAINED
    assert (await machine.shell("pgrep -c -x -f 'sleep 1000000' || true")).strip() == "0"


async def _number_of_daemon(machine: Machine, life: int) -> str:
    async def has_said() -> bool:
        return len((await machine.output("/agent/output")).split()) > life

    await until(has_said, PATIENCE_S)
    return (await machine.output("/agent/output")).split()[life]


@pytest.mark.usefixtures("without_duties")
async def test_a_rotated_token_is_the_only_one_left(machine: Machine):
    daemon = ["sh", "-c", "exec sleep 2000000"]
    old, new = secrets.token_hex(16), secrets.token_hex(16)
    await machine.put_setup(SetupBody(id="old", fuse={"auth-token": file(f"{old}\n")}))
    await machine.start_daemon(AgentOrder(id="old", command=daemon))
    with_token = "grep -l -a -s FUSE_AUTH_TOKEN={} /proc/[0-9]*/environ | wc -l"
    assert (await machine.shell(with_token.format(old))).strip() == "1"
    await machine.put_setup(SetupBody(id="new", fuse={"auth-token": file(f"{new}\n")}))
    state = await machine.start_daemon(AgentOrder(id="new", command=daemon))
    assert state.agent.state is AgentState.RUNNING
    assert (await machine.shell(with_token.format(old))).strip() == "0"
    assert (await machine.shell(with_token.format(new))).strip() == "1"
    assert (await machine.shell("cat /fuse/auth-token")).strip() == new


@pytest.mark.usefixtures("without_duties")
async def test_a_machine_that_runs_out_of_memory_keeps_its_agent(machine: Machine):
    daemon = AgentOrder(id="hungry", command=["sh", "-c", "echo up; head -c 1G /dev/zero | tail -n 1; sleep 1000000"])
    await machine.start_daemon(daemon)
    # `tail` keeps what has no line end in memory, until the kernel ends it.
    await until(lambda: _was_killed(machine), PATIENCE_S)
    assert (await machine.send("GET", "/state", GuestState)).agent_id == "hungry"
    assert (await machine.shell("echo fine")) == "fine\n"


async def _was_killed(machine: Machine) -> bool:
    log = await machine.host.ask("GET", "/machines/m-setup/logs?tail_bytes=65536", machine.fence)
    return b"Out of memory: Killed process" in log or b"oom-kill" in log


# -- the health check ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_duties")
async def test_verdicts_of_a_web_site(machine: Machine):
    await machine.serve(8098, "/well")
    check = Healthcheck(http=HttpCheck(port=8098, path="/ready"), interval_seconds=1, timeout_seconds=1, retries=2)
    await machine.send("PUT", "/healthcheck", GuestState, check)
    state = await machine.await_verdict(Verdict.FAILING)
    assert state.health.failures >= 2
    assert state.health.message.endswith("status 503")
    await machine.shell("echo well > /well")
    state = await machine.await_verdict(Verdict.PASSING)
    assert (state.health.failures, state.health.message) == (0, "")
    await machine.shell("rm /well")
    await machine.await_verdict(Verdict.FAILING)


@pytest.mark.usefixtures("without_duties")
async def test_verdicts_of_a_command(machine: Machine):
    check = Healthcheck(exec=("sh", "-c", "cat /verdict"), interval_seconds=1, timeout_seconds=1, retries=1)
    await machine.send("PUT", "/healthcheck", GuestState, check)
    state = await machine.await_verdict(Verdict.FAILING)
    assert "/verdict" in state.health.message
    await machine.shell("touch /verdict")
    await machine.await_verdict(Verdict.PASSING)
    state = await machine.send("DELETE", "/healthcheck", GuestState)
    assert state.health is None


# -- the end ---------------------------------------------------------------------------------------------------------


async def test_a_stop_lets_the_daemon_say_goodbye_and_the_next_boot_knows_nothing(machine: Machine):
    """Each process is told once; one that does not care keeps nobody from a clean end."""
    daemon = "trap 'echo bye > /bye; exit 0' TERM; echo waiting; while :; do sleep 0.1; done"
    stubborn = "trap 'echo asked >> /asked' TERM; touch /stubborn; while :; do sleep 0.1; done"
    await machine.shell(f'setsid sh -c "{stubborn}" > /dev/null 2>&1 & until test -e /stubborn; do sleep 0.1; done')
    await machine.put_setup(SetupBody(id="last", fuse={"auth-token": file("t0ken")}, env={"LAST": "1"}))
    await machine.start_daemon(AgentOrder(id="last", command=["sh", "-c", daemon]))
    await until(lambda: machine.says("/agent/output", "waiting"), PATIENCE_S)
    await machine.host.ask("POST", "/machines/m-setup/stop", machine.fence)
    await machine.host.ask("POST", "/machines/m-setup/start", machine.fence)
    assert await machine.shell("cat /bye /asked; ls -A /fuse; echo .$LAST") == "bye\nasked\n.\n"
    assert "guest_not_shut_down" not in machine.host.log.read_text()
    state = await machine.send("GET", "/state", GuestState)
    assert (state.setup_id, state.agent_id, state.agent, state.health) == ("", "", None, None)
