"""Supervision: children that serve, end, are started again; identities; addresses; what `up` leaves on disk."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusevm.cli import installation, processes, settings, stack
from fusevm.cli.addresses import choose_address
from fusevm.cli.failures import CliError
from fusevm.cli.installation import (
    UpRecord,
    end_predecessor,
    load_settings,
    make_folders,
    read_or_make_token,
    save_settings,
    take_lock,
    to_environ,
)
from fusevm.cli.leftovers import find_leftovers
from fusevm.cli.places import Places
from fusevm.cli.processes import Identity, end, identify, is_running
from fusevm.cli.stack import Program, Stack, StartFailed, last_words, rotate
from fusevm.cli.supervised import VARIABLE
from fusevm.model.errors import DataRootInUse, PortInUse

Child = Callable[[str], subprocess.Popen[bytes]]
SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def child() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", code]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


# -- identities --------------------------------------------------------------------------------------------------------


def test_an_identity_is_one_process_and_never_another(child: Child) -> None:
    process = child(SLEEP)
    who = identify(process.pid)
    assert who is not None
    assert is_running(who)
    other = Identity(pid=who.pid, start_ticks=who.start_ticks + 1, boot_id=who.boot_id)
    assert not is_running(other)
    assert end(other, signal.SIGKILL, 1), "somebody else's pid is nothing to end"
    assert process.poll() is None
    assert end(who, signal.SIGTERM, 60)
    process.wait()
    assert not is_running(who)
    assert end(who, signal.SIGTERM, 1)


def test_a_process_that_does_not_end_is_told(child: Child, tmp_path: Path) -> None:
    marker = tmp_path / "up"
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN);"
    process = child(f"{deaf} open({str(marker)!r}, 'w').close(); time.sleep(600)")
    wait_for(marker.exists)
    who = identify(process.pid)
    assert who is not None
    assert not end(who, signal.SIGTERM, 0.1)


def test_zombies_are_not_running() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: identify(process.pid) is None)
    process.wait()
    assert processes.identify(2**22 + 1) is None


# -- children ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_code(tmp_path: Path) -> Callable[[str], Program]:
    """Programs of a few words of Python; READY among them says that it serves."""
    marker = tmp_path / "ready"

    def make(code: str) -> Program:
        code = code.replace("READY", f"open({str(marker)!r}, 'w').close()")
        command = [sys.executable, "-c", code]
        return Program(name="daemon", command=command, environ={}, log=tmp_path / "daemon.log", is_ready=marker.exists)

    return make


def no_pause(seconds: float) -> None:
    del seconds


def test_a_child_that_serves_ends_with_the_stack(run_code: Callable[[str], Program]) -> None:
    with Stack(print) as running:
        running.start(run_code(f"READY; {SLEEP}"), 60)
        who = running.children[0].identity
        assert who is not None
        assert os.getsid(who.pid) == who.pid, "Ctrl-C does not reach it"
        assert running.check() is False
    assert not is_running(who)


def test_a_child_that_does_not_start_is_quoted(run_code: Callable[[str], Program]) -> None:
    with Stack(print) as running, pytest.raises(StartFailed, match="did not start: KeyError: 'x'") as caught:
        running.start(run_code("{}['x']"), 60)
    assert "daemon.log" in caught.value.hint
    assert caught.value.code == 5


def test_a_childs_refusal_is_passed_on_with_hint_and_code(run_code: Callable[[str], Program], tmp_path: Path) -> None:
    (tmp_path / "daemon.log").write_text("fuse: what an earlier run said\n")
    refuse = "import sys; print('fuse: listen: it is taken\\n      take another', file=sys.stderr); sys.exit(4)"
    with Stack(print) as running, pytest.raises(CliError) as caught:
        running.start(run_code(refuse), 60)
    assert not isinstance(caught.value, StartFailed)
    assert (str(caught.value), caught.value.hint, caught.value.code) == ("listen: it is taken", "take another", 4)


def test_what_an_earlier_run_said_is_not_repeated(run_code: Callable[[str], Program], tmp_path: Path) -> None:
    (tmp_path / "daemon.log").write_text("fuse: what an earlier run said\n")
    with Stack(print) as running, pytest.raises(StartFailed):
        running.start(run_code("raise SystemExit(3)"), 60)


def test_a_child_that_never_serves_is_given_up(run_code: Callable[[str], Program]) -> None:
    with Stack(print) as running, pytest.raises(CliError, match="does not answer after 0 s"):
        running.start(run_code(SLEEP), 0.3)


def test_a_child_that_ends_is_started_again(run_code: Callable[[str], Program]) -> None:
    said: list[str] = []
    with Stack(said.append, no_pause) as running:
        running.start(run_code(f"READY; print('working'); {SLEEP}"), 60)
        first = running.children[0].identity
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: running.children[0].exit_status is not None)
        assert running.check() is True
        second = running.children[0].identity
        assert second is not None
        assert second != first
    assert said[0].startswith("the daemon ended (SIGKILL) and is started again")


def test_a_child_that_keeps_ending_is_given_up(run_code: Callable[[str], Program]) -> None:
    said: list[str] = []
    with Stack(said.append, no_pause) as running:
        running.start(run_code("READY; raise SystemExit('fuse: no luck')"), 60)

        def check() -> None:
            while True:
                wait_for(lambda: running.children[0].exit_status is not None)
                running.check()

        with pytest.raises(CliError, match="keeps ending: no luck"):
            check()
    assert len(said) == 5


def test_a_child_notices_that_its_supervisor_was_killed(tmp_path: Path) -> None:
    """The supervisor is a process of its own, killed with SIGKILL; the child is a real supervised one."""
    marker = tmp_path / "pid"
    daemon = (
        "import os, pathlib, time; from fusevm.cli.supervised import follow_supervisor; follow_supervisor(os.environ);"
        f"pathlib.Path({str(marker)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    supervisor = (
        "import os, subprocess, sys, time; r, w = os.pipe();"
        f"environ = os.environ | {{{VARIABLE!r}: str(r)}};"
        f"subprocess.Popen([sys.executable, '-c', {daemon!r}], pass_fds=[r], env=environ);"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", supervisor])
    wait_for(lambda: marker.exists() and bool(marker.read_text()))
    pid = int(marker.read_text())
    assert identify(pid) is not None
    process.kill()
    process.wait()
    wait_for(lambda: identify(pid) is None)


def test_logs_are_kept_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "x.log"
    rotate(log)
    log.write_text("a line\nfuse: what happened\n      a hint\n")
    assert last_words(log) == "what happened"
    log.write_text("one\ntwo\n\n")
    assert last_words(log) == "two"
    monkeypatch.setattr(stack, "LOG_LIMIT_BYTES", 4)
    rotate(log)
    assert log.read_text() == ""
    assert (tmp_path / "x.log.1").read_text() == "one\ntwo\n\n"
    assert last_words(log) == last_words(tmp_path / "none") == "it said nothing"


# -- what an installation keeps ----------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> Places:
    made = Places(data=tmp_path / "data")
    make_folders(made)
    return made


def test_folders_and_token_are_private(places: Places) -> None:
    for folder in (places.host, places.control, places.logs):
        assert folder.stat().st_mode & 0o777 == 0o700
    token = read_or_make_token(places.token, "")
    assert len(token) >= 40
    assert places.token.stat().st_mode & 0o777 == 0o600
    assert read_or_make_token(places.token, "") == token
    assert read_or_make_token(places.token, "given") == "given"


def test_a_folder_has_one_user(places: Places) -> None:
    me = identify(os.getpid())
    assert me is not None
    places.record.write_bytes(installation.msgspec.json.encode(UpRecord(supervisor=me)))
    with take_lock(places), pytest.raises(DataRootInUse) as caught:
        take_lock(places)
    assert caught.value.pid == str(os.getpid())
    take_lock(places).close()


def test_what_an_earlier_up_left_is_ended(places: Places, child: Child) -> None:
    process = child(SLEEP)
    left, me = identify(process.pid), identify(os.getpid())
    assert left is not None
    assert me is not None
    reused = Identity(pid=os.getpid(), start_ticks=me.start_ticks - 1, boot_id=me.boot_id)
    record = UpRecord(supervisor=reused, children=[left, reused])
    places.record.write_bytes(installation.msgspec.json.encode(record))
    said: list[str] = []
    end_predecessor(places, said.append)
    assert process.wait(120) == -signal.SIGTERM
    assert said


def test_a_damaged_record_is_no_record(places: Places) -> None:
    places.record.write_text("{")
    end_predecessor(places, print)
    assert load_settings(places) == {}


def test_the_hosts_settings_are_remembered(places: Places) -> None:
    environ = {"FUSE_INSTANCE": "two", "FUSE_USER_NETWORK": "true", "FUSE_MAX_MACHINES": "3"}
    host = settings.load("host", {}, environ)
    save_settings(places, host)
    again = settings.load("host", load_settings(places), {})
    assert dict(again.values) == dict(host.values)


def test_children_get_exactly_the_settings_that_were_given() -> None:
    loaded = settings.load("control", {"log_json": "true", "allowed_hosts": "a,b"}, {"ORCH_AUTH_TOKEN": "t"})
    environ = to_environ(loaded)
    assert {name: value for name, value in environ.items() if value} == {
        "FUSE_LOG_JSON": "true",
        "FUSE_ALLOWED_HOSTS": "a,b",
        "ORCH_AUTH_TOKEN": "t",
    }
    assert environ["FIRECRACKER_BASE_URL"] == ""


def test_a_taken_port_is_replaced_unless_it_was_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        chosen = choose_address(settings.load("control", {}, {}), "listen", address)
        assert chosen != address
        assert chosen.startswith("127.0.0.1:")
        asked = settings.load("control", {}, {"ORCH_LISTEN": address})
        with pytest.raises(PortInUse) as caught:
            choose_address(asked, "listen", "127.0.0.1:0")
        assert caught.value.setting == "ORCH_LISTEN"
    assert choose_address(asked, "listen", "127.0.0.1:0") == address


def test_leftovers_are_found_by_folder_and_name(tmp_path: Path, child: Child) -> None:
    assert find_leftovers(tmp_path / "none", "zz9") == []
    process = child(f"import time, os; os.chdir({str(tmp_path)!r}); open('here', 'w').close(); time.sleep(600)")
    wait_for((tmp_path / "here").exists)
    found = find_leftovers(tmp_path, "zz9")
    assert any(name.startswith(f"process {process.pid} ") for name in found)
    assert f"folder {tmp_path}" in found


def wait_for(is_true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < ends_at
        time.sleep(0.01)
