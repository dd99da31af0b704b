"""The commands against `fuse up` with real microVMs. One machine is shared; tests that end something come last."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clean_environ import clean_environ
from local_stack import ARTEFACTS, LocalStack
from terminal_window import FUSE, TerminalWindow

from fusevm.cli.ephemeral import free_range
from fusevm.cli.leftovers import find_leftovers
from fusevm.cli.processes import identify

pytestmark = [
    pytest.mark.real,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="`fuse up` with its own network needs root"),
    pytest.mark.timeout(900),
    pytest.mark.shared_stack,
]
PROMPT = r"# $"
FOREVER = ["sh", "-c", "echo up; exec sleep 1000"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    folder = tmp_path_factory.mktemp("real")
    local = LocalStack(folder, clean_environ(folder))
    local.up()
    try:
        yield local
    finally:
        local.down()


@pytest.fixture(scope="module")
def machine(stack: LocalStack) -> str:
    made = stack.fuse("env", "create", "debian-12", "--task-id", "shared")
    assert (made.returncode, made.stdout) == (0, "fuse-shared\n"), made.stderr
    return "shared"


@pytest.fixture
def window(stack: LocalStack, machine: str) -> Iterator[TerminalWindow]:
    with TerminalWindow([*FUSE, "shell", machine], stack.environ, rows=30, cols=100) as opened:
        opened.wait_for(PROMPT)
        opened.type("PS1='# '; stty -echo; bind 'set enable-bracketed-paste off'; echo re''ady\n")
        opened.wait_for("ready\r\n")
        opened.wait_for(PROMPT)
        yield opened


# -- what is said ----------------------------------------------------------------------------------------------------


def test_lists_show_the_machine(stack: LocalStack, machine: str) -> None:
    lines = stack.fuse("env", "list").stdout.splitlines()
    assert lines[0].split() == ["ID", "STATE", "IMAGE", "CPUS", "RAM", "DISK", "HOST", "AGE"]
    assert lines[1].split()[:9] == ["fuse-shared", "running", "debian-12", "1", "512", "MiB", "4", "GiB", "default"]
    listed = json.loads(stack.fuse("env", "list", "-o", "json").stdout)
    assert [one["id"] for one in listed] == ["fuse-shared"]
    assert listed[0]["timings"]["boot_ms"] > 0
    assert "the machine came up" in stack.fuse("story", machine).stdout
    hosts = json.loads(stack.fuse("host", "list", "-o", "json").stdout)
    assert [(host["id"], host["health"]) for host in hosts] == [("default", "ok")]
    versions = json.loads(stack.fuse("version", "-o", "json").stdout)
    assert versions["server"]["version"] == versions["client"] == versions["hosts"][0]["version"]
    assert "qemu" in versions["hosts"][0]["driver"]
    for part in ("vmm_version", "agent_version", "kernel"):
        assert versions["hosts"][0][part], part
    state = json.loads(stack.fuse("host", "state").stdout)
    assert len(state["journal"]["entries"]) == 1


def test_exit_codes(stack: LocalStack, machine: str) -> None:
    assert stack.fuse("exec", "-n", machine, "--", "sh", "-c", "exit 37").returncode == 37
    assert stack.fuse("exec", "-n", machine, "/no/such").returncode == 2
    assert stack.fuse("env", "get", "nope").returncode == 3
    assert stack.fuse("env", "create", "--task-id", machine).returncode == 4
    assert stack.fuse("env", "create", "no-such-image").returncode == 2
    assert stack.fuse("env", "list", "--token", "wrong").returncode == 6
    assert stack.fuse("env", "list", "--url", "http://127.0.0.1:9").returncode == 5
    timed_out = stack.fuse("exec", "-n", "--timeout", "1s", machine, "sleep", "60")
    assert timed_out.returncode == 124


def test_exec_has_streams_environment_and_user(stack: LocalStack, machine: str) -> None:
    done = stack.fuse("exec", machine, "--", "sh", "-c", "cat; echo err >&2", input="in\n")
    assert (done.stdout, done.stderr) == ("in\n", "err\n")
    script = 'echo "$K $PWD $(id -u)"'
    done = stack.fuse("exec", "-n", "-e", "K=v", "-w", "/tmp", "-u", "1234", machine, "--", "sh", "-c", script)
    assert done.stdout == "v /tmp 1234\n"


def test_exec_passes_bytes_through_unchanged(stack: LocalStack, machine: str) -> None:
    data = os.urandom(4 << 20)
    done = stack.fuse("exec", machine, "cat", input=data, text=False)
    assert done.stdout == data  # type: ignore[comparison-overlap]  # text=False


def test_the_console_is_a_log(stack: LocalStack, machine: str) -> None:
    assert "fused: ready" in stack.fuse("logs", machine).stdout


# -- a shell in a terminal -------------------------------------------------------------------------------------------


def test_stty_size_follows_the_window(window: TerminalWindow) -> None:
    window.wait_size(30, 100)
    window.resize(41, 133)
    window.wait_size(41, 133)


def test_ctrl_c_stops_sleep_and_not_the_shell(window: TerminalWindow) -> None:
    window.start_sleep()
    window.type("\x03")
    window.wait_for(PROMPT)
    window.type("echo sta''tus $?\n")
    window.wait_for("status 130\r\n")
    window.type("exit 37\n")
    assert window.wait_end() == 37


def test_a_paste_of_one_mebibyte_arrives_whole(window: TerminalWindow, stack: LocalStack, machine: str) -> None:
    lines = b"".join(b"%06d %s\n" % (number, b"x" * 56) for number in range(16384))
    copy = f"head -c {len(lines)} > /root/pasted"
    window.type(f"stty -icanon -echo; echo li''stens; {copy}; stty icanon; echo wri''tten\n")
    window.wait_for("listens\r\n")
    window.type(lines)
    window.wait_for("written\r\n")
    done = stack.fuse("exec", "-n", machine, "sha256sum", "/root/pasted")
    assert done.stdout.split()[0] == hashlib.sha256(lines).hexdigest()


def test_a_large_output_arrives_whole(window: TerminalWindow) -> None:
    window.type("seq 1 100000; echo e''nd\n")
    window.wait_for("99999\r\n100000\r\nend\r\n")


# -- copies ----------------------------------------------------------------------------------------------------------


def test_files_and_folders_come_back_as_they_went(stack: LocalStack, machine: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep/data").write_bytes(os.urandom(3_000_000))
    (tree / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tree / "run.sh").chmod(0o755)
    (tree / "link").symlink_to("deep/data")
    assert stack.fuse("cp", str(tree), f"{machine}:/root/copy").returncode == 0
    assert stack.fuse("exec", "-n", machine, "/root/copy/run.sh").stdout == "ran\n"
    back = stack.fuse("cp", f"{machine}:/root/copy", str(tmp_path / "back"))
    assert back.returncode == 0, back.stderr
    assert (tmp_path / "back/deep/data").read_bytes() == (tree / "deep/data").read_bytes()
    assert (tmp_path / "back/link").readlink() == Path("deep/data")
    assert (tmp_path / "back/run.sh").stat().st_mode & 0o777 == 0o755
    done = stack.fuse("cp", "-", f"{machine}:/root/stdin", input="piped")
    assert done.returncode == 0, done.stderr
    assert stack.fuse("cp", "-q", f"{machine}:/root/stdin", "-").stdout == "piped"


def copied_bytes(pid: int) -> int:
    """What a process has read from and written to files (proc(5), /proc/[pid]/io)."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["rchar"]) + int(fields["wchar"])


def test_a_copy_that_is_killed_leaves_no_partial_target(stack: LocalStack, machine: str, tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(512 << 20)
    for source, target in ((str(big), f"{machine}:/root/half"), (f"{machine}:/root/big", str(tmp_path / "half"))):
        if source.startswith(machine):
            made = stack.fuse("exec", "-n", machine, "--", "sh", "-c", "rm -f /root/half; truncate -s 1G /root/big")
            assert made.returncode == 0, made.stderr
        process = subprocess.Popen([*FUSE, "cp", "-q", source, target], env=stack.environ)
        ends_at = time.monotonic() + 120
        while copied_bytes(process.pid) < 64 << 20:
            assert process.poll() is None, "the copy was too quick for this test"
            assert time.monotonic() < ends_at
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big"]
    assert stack.fuse("exec", "-n", machine, "ls", "-A", "/root").stdout.split().count("half") == 0
    assert stack.fuse("exec", "-n", machine, "rm", "/root/big").returncode == 0


# -- run -------------------------------------------------------------------------------------------------------------


def test_run_leaves_nothing(stack: LocalStack, machine: str) -> None:
    done = stack.fuse("run", "-n", "debian-12", "--ram", "256M", "--", "sh", "-c", "hostname; exit 9")
    assert done.returncode == 9, done.stderr
    assert done.stdout.startswith("run-")
    assert stack.fuse("env", "list", "-q").stdout == "fuse-shared\n"


def test_ctrl_c_ends_run_and_its_machine(stack: LocalStack, machine: str) -> None:
    with TerminalWindow([*FUSE, "run", "debian-12", "--", *FOREVER], stack.environ) as window:
        window.wait_for("up\r\n")
        window.type("\x03")
        assert window.wait_end() == 130
    assert stack.fuse("env", "list", "-q").stdout == "fuse-shared\n"


# -- up and down: each test leaves the stack up ----------------------------------------------------------------------


def test_a_second_up_is_refused(stack: LocalStack) -> None:
    done = stack.fuse("up")
    assert done.returncode == 4
    assert f"{stack.data} is in use by another process (pid {stack.process.pid})" in done.stderr  # type: ignore[union-attr]


def test_a_port_that_was_asked_for_must_be_free(stack: LocalStack, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = stack.fuse("up", "--data", str(tmp_path / "other"), "--listen", address, "--image", "")
    assert done.returncode == 4
    assert f"The address {address} is in use; choose another with --listen" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--image", "no-such-image"], 2, "There is no image 'no-such-image'"),
        (["--kernel", "/etc/hostname"], 2, "The kernel file /etc/hostname is damaged"),
        (["--run-dir", f"/tmp/{'x' * 90}"], 2, "is too long for a Unix socket"),
        (["--instance", "STACK"], 4, "choose another with --instance"),
    ],
)
def test_a_refused_start_leaves_nothing(
    stack: LocalStack, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    """Beside a running stack, which must not notice."""
    line = [stack.instance if word == "STACK" else word for word in arguments]
    addresses = free_range(Path("/proc/net/route").read_text())
    apart = [] if "STACK" in arguments else ["--instance", f"{stack.instance[:6]}x", "--network-range", addresses]
    done = stack.fuse("up", "--data", str(tmp_path / "other"), *apart, *line)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("fuse: ")
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert stack.fuse("host", "list").returncode == 0


def test_what_the_control_plane_refuses_ends_the_host_daemon_too(stack: LocalStack) -> None:
    """The host daemon has made slots and rules by then, which go with the start that came to nothing."""
    instance = f"{stack.instance[:6]}y"
    with tempfile.TemporaryDirectory(prefix="fuse-test-", dir="/var/tmp") as folder:
        data = Path(folder)
        data.chmod(0o711)
        (data / "control").mkdir(mode=0o700)
        (data / "control/fuse.db").write_text("not of the control plane's user")
        (data / "control/fuse.db").chmod(0o600)
        addresses = free_range(Path("/proc/net/route").read_text())
        done = stack.fuse("up", "--data", folder, "--instance", instance, "--network-range", addresses)
        assert done.returncode == 2
        assert done.stderr.startswith(f"fuse: DATABASE_URL: {data}/control/fuse.db: ")
        assert {path.name for path in data.iterdir()} == {"control"}
        left = [name for name in find_leftovers(data, instance) if name != f"folder {data}"]
        assert left == []


def boot_id(stack: LocalStack, machine: str) -> str:
    done = stack.fuse("exec", "-n", machine, "cat", "/proc/sys/kernel/random/boot_id")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_killed_up_finds_its_machines_again(stack: LocalStack, machine: str) -> None:
    before = boot_id(stack, machine)
    stack.end(signal.SIGKILL)
    stack.up()
    assert stack.fuse("env", "list", "-q").stdout == "fuse-shared\n"
    assert boot_id(stack, machine) == before, "the same machine, not a new one"


def test_ctrl_c_leaves_the_machines_running(stack: LocalStack, machine: str) -> None:
    before = boot_id(stack, machine)
    assert stack.end(signal.SIGINT) == 0
    assert "1 environment keeps running" in stack.log.read_text()
    assert stack.fuse("env", "list").returncode == 5
    stack.up()
    assert boot_id(stack, machine) == before


def test_the_terminal_is_restored_when_the_control_plane_dies(stack: LocalStack, machine: str) -> None:
    record = json.loads((stack.data / "up.json").read_text())
    control = record["children"][1]["pid"]
    with TerminalWindow(["/bin/sh", "-i"], stack.environ | {"PS1": "local> "}) as window:
        window.wait_for("local> ")
        modes = window.modes
        window.type(f"{' '.join(FUSE)} shell {machine}\n")
        window.wait_for("# ")
        assert window.is_raw
        os.kill(control, signal.SIGKILL)
        window.wait_for("fuse: The connection to .* broke")
        window.wait_for("local> ")
        assert window.modes == modes
    ends_at = time.monotonic() + 240
    while stack.fuse("env", "list").returncode:
        assert time.monotonic() < ends_at, "the control plane was not started again"
    assert "the control plane ended (SIGKILL) and is started again" in stack.log.read_text()
    ends_at = time.monotonic() + 240
    while stack.fuse("exec", "-n", machine, "true").returncode:
        assert time.monotonic() < ends_at, "the machine was lost"


def test_the_daemons_have_different_users(stack: LocalStack) -> None:
    record = json.loads((stack.data / "up.json").read_text())
    users = [Path(f"/proc/{child['pid']}").stat().st_uid for child in record["children"]]
    assert users[0] == 0
    assert users[1] != 0
    for secret in ("api-token", "host/token", "control/fuse.db"):
        assert (stack.data / secret).stat().st_mode & 0o077 == 0


def test_down_keep_leaves_the_machines(stack: LocalStack, machine: str) -> None:
    before = boot_id(stack, machine)
    assert stack.fuse("down", "--keep").returncode == 0
    assert stack.process is not None
    assert stack.process.wait(240) == 0
    stack.up()
    assert boot_id(stack, machine) == before


def test_down_leaves_nothing(stack: LocalStack, machine: str) -> None:
    del machine
    done = stack.fuse("down")
    assert done.returncode == 0, done.stderr
    assert "fuse-shared destroyed" in done.stderr
    assert stack.leftovers() == []
    stack.up()


def test_down_cleans_up_after_a_killed_up(stack: LocalStack) -> None:
    assert stack.fuse("env", "create", "--task-id", "orphan").returncode == 0
    stack.end(signal.SIGKILL)
    done = stack.fuse("down")
    assert done.returncode == 0, done.stderr
    assert "fuse-orphan destroyed" in done.stderr
    assert stack.leftovers() == []


def test_the_quickstart_leaves_nothing(stack: LocalStack, tmp_path: Path) -> None:
    environ = stack.base_environ | {"FUSE_DATA_DIR": str(ARTEFACTS)}
    for name in ("FUSE_INSTANCE", "FUSE_NETWORK_RANGE", "FUSE_ARTEFACT_ROOT"):
        del environ[name]
    done = subprocess.run(
        [sys.executable, "-m", "fusevm.cli.quickstart"],
        env=environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "went in and came out unchanged" in done.stdout
    assert "Nothing was left behind" in done.stdout
    assert list(tmp_path.iterdir()) == []


def traces_of_ephemeral_stacks() -> set[str]:
    """Temporary folders, namespaces, interfaces and run directories with the names of ephemeral stacks."""
    names = re.compile(r"fuse-[a-z0-9_]{8}|q[0-9a-f]{6}(-.*)?")
    folders = ("/var/tmp", "/run/netns", "/sys/class/net", "/run")
    return {f"{folder}/{name}" for folder in folders for name in os.listdir(folder) if names.fullmatch(name)}  # noqa: PTH208


@pytest.mark.parametrize(("moment", "after_s"), [("Starting Fuse", 0.3), ("Starting Fuse", 2), ("a Python program", 0)])
def test_an_interrupted_quickstart_leaves_nothing(
    stack: LocalStack, tmp_path: Path, moment: str, after_s: float
) -> None:
    before = traces_of_ephemeral_stacks()
    environ = stack.base_environ | {"FUSE_DATA_DIR": str(ARTEFACTS), "TMPDIR": str(tmp_path)}
    for name in ("FUSE_INSTANCE", "FUSE_NETWORK_RANGE", "FUSE_ARTEFACT_ROOT"):
        del environ[name]
    with TerminalWindow([sys.executable, "-m", "fusevm.cli.quickstart"], environ) as window:
        window.wait_for(moment, timeout_s=300)
        time.sleep(after_s)
        window.type("\x03")
        assert window.wait_end() == 130
    ends_at = time.monotonic() + 120
    while left := traces_of_ephemeral_stacks() - before:
        assert time.monotonic() < ends_at, left
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []
    assert identify(window.pid) is None
