"""`fuse shell`, `exec` and `run` in a real terminal, against a server whose machine is this one."""

import asyncio
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from fake_api import FakeApi
from starlette.responses import StreamingResponse
from terminal_window import FUSE, TerminalWindow

PROMPT = r"\$ $"
FOREVER = ["sh", "-c", "echo up; exec sleep 1000"]


@pytest.fixture
def window(environ: dict[str, str]):  # type: ignore[no-untyped-def]
    with TerminalWindow([*FUSE, "shell", "a"], environ, rows=30, cols=100) as opened:
        opened.type("PS1='$ '; stty -echo; bind 'set enable-bracketed-paste off' 2>/dev/null; echo re''ady\n")
        opened.wait_for("ready\r\n")
        opened.wait_for(PROMPT)
        yield opened


def test_the_shell_has_our_size_and_follows_it(window: TerminalWindow) -> None:
    window.wait_size(30, 100)
    window.resize(41, 133)
    window.wait_size(41, 133)


def test_ctrl_c_stops_the_command_and_not_the_shell(window: TerminalWindow) -> None:
    window.start_sleep()
    window.type("\x03")
    window.wait_for(PROMPT)
    window.type("echo sta''tus $?\n")
    window.wait_for("status 130\r\n")


def test_ctrl_z_and_ctrl_d_belong_to_the_other_side(window: TerminalWindow) -> None:
    window.start_sleep()
    window.type("\x1a")
    window.wait_for("Stopped")
    window.wait_for(PROMPT)
    window.type("kill -9 %1; while [ -n \"$(jobs -s)\" ]; do sleep 0.1; done; echo mo''re\n")
    window.wait_for("more\r\n")
    window.wait_for(PROMPT)
    window.type("\x04")
    window.wait_end()


def test_the_exit_code_of_the_shell_is_ours(window: TerminalWindow) -> None:
    before = window.is_raw
    assert before
    window.type("exit 37\n")
    assert window.wait_end() == 37


def test_a_paste_of_one_mebibyte_arrives_whole(window: TerminalWindow, tmp_path: Path) -> None:
    target = tmp_path / "pasted"
    lines = b"".join(b"%06d %s\n" % (number, b"x" * 56) for number in range(16384))
    assert len(lines) == 1 << 20
    window.type(f"stty -icanon -echo; echo li''stens; head -c {len(lines)} > {target}; stty icanon; echo wri''tten\n")
    window.wait_for("listens\r\n")
    window.type(lines)
    window.wait_for("written\r\n")
    assert target.read_bytes() == lines


def test_the_terminal_is_restored_at_the_end(environ: dict[str, str]) -> None:
    """Of the local shell from which `fuse shell` is called."""
    with TerminalWindow(["/bin/sh", "-i"], environ | {"PS1": "local> "}) as window:
        window.wait_for("local> ")
        modes = window.modes
        window.type(f"{' '.join(FUSE)} shell a -- sh -c 'echo in''side; read x; exit 3'\n")
        window.wait_for("inside\r\n")
        window.wait_until(lambda: window.is_raw)
        window.type("\n")
        window.wait_for("local> ")
        assert window.modes == modes
        window.type("echo code $?\n")
        window.wait_for("code 3\r\n")


def test_the_terminal_is_restored_when_the_server_dies(environ: dict[str, str], api: FakeApi) -> None:
    with TerminalWindow(["/bin/sh", "-i"], environ | {"PS1": "local> "}) as window:
        window.wait_for("local> ")
        modes = window.modes
        window.type(f"{' '.join(FUSE)} shell a\n")
        window.wait_until(lambda: window.is_raw)
        window.type("echo in''side\n")
        window.wait_for("inside\r\n")
        api.stop()
        window.wait_for("fuse: The connection to .* broke")
        window.wait_for("local> ")
        assert window.modes == modes
        window.type("echo code $?\n")
        window.wait_for("code 5\r\n")


def test_the_terminal_is_restored_on_sigterm(environ: dict[str, str]) -> None:
    with TerminalWindow([*FUSE, "shell", "a"], environ) as window:
        before = window.modes
        window.wait_until(lambda: window.is_raw)
        os.kill(window.pid, signal.SIGTERM)
        window.wait_until(lambda: window.modes == before)
        assert window.wait_end() == 143


def test_closing_the_window_ends_the_session(environ: dict[str, str], api: FakeApi, tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    with TerminalWindow([*FUSE, "shell", "a", "--", "sh", "-c", f"echo $$ > {marker}; exec sleep 1000"], environ):
        wait_for_file(marker)
        pid = int(marker.read_text())
    ends_at = time.monotonic() + 120
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < ends_at
        time.sleep(0.05)


def test_a_script_can_be_fed_to_a_shell(environ: dict[str, str]) -> None:
    done = subprocess.run(
        [*FUSE, "shell", "a"],
        input=b"echo one; tty; echo two >&2; exit 7\n",
        capture_output=True,
        env=environ,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, b"one\nnot a tty\n", b"two\n")


# -- exec ------------------------------------------------------------------------------------------------------------


def test_exec_passes_bytes_through_unchanged(environ: dict[str, str]) -> None:
    data = os.urandom(8 << 20)
    done = subprocess.run(
        [*FUSE, "exec", "a", "cat"], input=data, capture_output=True, env=environ, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == data


def test_exec_with_a_terminal(environ: dict[str, str]) -> None:
    with TerminalWindow([*FUSE, "exec", "-t", "a", "--", "sh", "-c", "tty -s && stty size; exit 4"], environ) as window:
        window.wait_for("24 80\r\n")
        assert window.wait_end() == 4


def test_ctrl_c_reaches_a_command_without_a_terminal(environ: dict[str, str], api: FakeApi) -> None:
    script = "trap 'echo caught; exit 5' INT; echo up; while :; do sleep 0.05; done"
    with TerminalWindow([*FUSE, "exec", "-n", "a", "--", "sh", "-c", script], environ) as window:
        window.wait_for("up\r\n")
        window.type("\x03")
        window.wait_for("caught")
        assert window.wait_end() == 5
    assert api.signals == ["INT"]


def test_a_second_ctrl_c_gives_up(environ: dict[str, str], api: FakeApi) -> None:
    script = "trap '' INT; echo up; while :; do sleep 0.05; done"
    with TerminalWindow([*FUSE, "exec", "-n", "a", "--", "sh", "-c", script], environ) as window:
        window.wait_for("up\r\n")
        window.type("\x03")
        window.wait_until(lambda: api.signals)
        window.type("\x03")
        assert window.wait_end() == 130


def test_a_reader_that_goes_away_is_no_error(environ: dict[str, str]) -> None:
    command = f"{' '.join(FUSE)} exec -n a -- yes | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=environ, timeout=240, check=False)
    assert done.stdout == b"y\n141\n"
    assert done.stderr == b""


def test_lists_end_quietly_when_their_reader_goes_away(environ: dict[str, str], api: FakeApi) -> None:
    for number in range(3000):
        api.add(f"t{number}")
    command = f"{' '.join(FUSE)} env list | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=environ, timeout=240, check=False)
    assert done.stdout.splitlines()[-1] in (b"141", b"0")
    assert done.stderr == b""


def test_a_background_job_is_not_stopped_for_input(environ: dict[str, str]) -> None:
    with TerminalWindow(["/bin/bash", "--norc", "-i"], environ | {"PS1": "local> "}) as window:
        window.wait_for("local> ")
        window.type(f"{' '.join(FUSE)} exec a -- echo do''ne & wait $!; echo code $?\n")
        window.wait_for("done")
        window.wait_for("code 0")


# -- run and lists ---------------------------------------------------------------------------------------------------


def test_ctrl_c_during_run_destroys_the_machine(environ: dict[str, str], api: FakeApi) -> None:
    with TerminalWindow([*FUSE, "run", "-n", "debian-12", "--", *FOREVER], environ) as window:
        window.wait_for("up\r\n")
        assert len(api.environments) == 2
        window.type("\x03")
        assert window.wait_end() == 130
    assert list(api.environments) == ["fuse-a"]


def test_ctrl_c_during_create_destroys_the_machine(environ: dict[str, str], api: FakeApi) -> None:
    async def slow():  # type: ignore[no-untyped-def]
        api.add("late")
        while not any(method == "DELETE" for method, *_ in api.requests):
            await asyncio.sleep(0.01)
        api.environments.pop("fuse-late")

    api.script("POST", "/v1/environments", slow)  # the answer is a failure, after Ctrl-C
    with TerminalWindow([*FUSE, "run", "-n", "debian-12", "--", "true"], environ) as window:
        window.wait_until(lambda: "fuse-late" in api.environments)
        window.type("\x03")
        assert window.wait_end() == 130
    assert any(method == "DELETE" for method, *_ in api.requests)


def test_sigterm_during_run_destroys_the_machine(environ: dict[str, str], api: FakeApi) -> None:
    with TerminalWindow([*FUSE, "run", "-n", "debian-12", "--", *FOREVER], environ) as window:
        window.wait_for("up\r\n")
        os.kill(window.pid, signal.SIGTERM)
        assert window.wait_end() == 143
    assert list(api.environments) == ["fuse-a"]


def test_a_table_on_a_terminal_is_drawn_and_json_is_not(environ: dict[str, str]) -> None:
    with TerminalWindow([*FUSE, "env", "list"], environ, cols=120) as window:
        assert window.wait_end() == 0
        assert b"\x1b[32mrunning" in window.screen
    with TerminalWindow([*FUSE, "env", "list", "-o", "json"], environ) as window:
        assert window.wait_end() == 0
        assert b"\x1b" not in window.screen
    with TerminalWindow([*FUSE, "env", "list"], environ | {"NO_COLOR": "1"}, cols=120) as window:
        assert window.wait_end() == 0
        assert b"\x1b[32m" not in window.screen


def test_a_killed_copy_leaves_no_partial_target(environ: dict[str, str], api: FakeApi, tmp_path: Path) -> None:
    (api.disk / "big").write_bytes(bytes(1000))
    folder = tmp_path / "here"
    folder.mkdir()
    sent = threading.Event()  # more than connections and pipes hold: the copy is under way

    def endless():  # type: ignore[no-untyped-def]
        async def pieces():  # type: ignore[no-untyped-def]
            for _ in range(100):
                yield bytes(100_000)
            sent.set()
            await asyncio.Event().wait()

        return StreamingResponse(pieces(), headers={"content-length": str(10_000 * 100_000)})

    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        api.script("GET", "/v1/environments/fuse-a/files", endless)
        sent.clear()
        process = subprocess.Popen([*FUSE, "cp", "-q", "a:/big", "target"], env=environ, cwd=folder)
        assert sent.wait(120)
        assert process.poll() is None
        process.send_signal(number)
        process.wait(120)
        assert list(folder.iterdir()) == []


def wait_for_file(path: Path, timeout_s: float = 120.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < ends_at
        time.sleep(0.02)
