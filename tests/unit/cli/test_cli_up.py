"""`fuse up` with input that cannot work: one line, an exit code that fits, and the machine as it was."""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_outcome import Outcome

from fusevm.cli import main, settings
from fusevm.cli.failures import CliError
from fusevm.cli.installation import Installation, make_folders, take_lock
from fusevm.cli.places import Places
from fusevm.cli.stack import StartFailed
from fusevm.host.journal import lock_directory
from fusevm.host.listeners import lock_instance
from fusevm.model.errors import KernelCorrupt

Up = Callable[..., Outcome]


@pytest.fixture
def up(environ: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Up:
    """Run `fuse up` for a folder that does not exist yet."""
    environ.setenv("XDG_RUNTIME_DIR", "/tmp/none")
    environ.setenv("HOME", str(tmp_path / "home"))

    def run(*arguments: str, data: Path = tmp_path / "far/data") -> Outcome:
        capfd.readouterr()
        line = ("up", "--data", str(data), "--instance", f"u{os.getpid()}", *arguments)
        return Outcome(main.run(line), *capfd.readouterr())

    return run


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--run-dir", f"/tmp/{'x' * 90}"], 2, r"The path /tmp/x+ is too long for a Unix socket"),
        (["--kernel", "BROKEN"], 2, r"The kernel file /.*/BROKEN is damaged or no kernel"),
        (["--kernel", "MISSING"], 2, r"The kernel file /.*/MISSING is .*No such file"),
        (["--image", "no-such-image"], 2, r"There is no image 'no-such-image'"),
        (["--max-machines", "0"], 2, r"--max-machines"),
        (["--max-machines", "many"], 2, r"--max-machines"),
        (["--driver", "magic"], 2, r"--driver"),
        (["--network-range", "10.0.0.0/99"], 2, r"--network-range"),
        (["--instance", "Capital"], 2, r"--instance"),
        (["--host-listen", "nowhere"], 2, r"--host-listen"),
        (["--listen", "nowhere"], 2, r"--listen"),
        (["--token-encryption-key", "short"], 2, r"--token-encryption-key"),
        (["--tls-cert", "BROKEN"], 2, r"ORCH_TLS_KEY \(or --tls-key\)"),
        (["--tls-cert", "BROKEN", "--tls-key", "BROKEN"], 2, r"--tls-cert: .* holds no certificate"),
        (["--listen", "TAKEN"], 4, r"The address 127.0.0.1:\d+ is in use; choose another with --listen"),
        (["--host-listen", "TAKEN"], 4, r"The address 127.0.0.1:\d+ is in use; choose another with --host-listen"),
        (["--instance", "taken"], 4, r"instance 'taken' is in use; choose another with --instance"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BROKEN").write_bytes(b"\x7fELF, it says")
    before = files(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken, lock_instance("taken"):
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = up(*(address if argument == "TAKEN" else argument for argument in arguments))
    assert (done.code, done.out) == (code, "")
    lines = done.err.splitlines()
    assert re.match(f"fuse: .*{words}", lines[0]), done.err
    assert len(lines) == 1
    assert files(tmp_path) == before


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives machines a network of the host's")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["--network-range", "127.0.64.0/20"],
            4,
            r"The machine address range 127.0.64.0/20 overlaps the route to 127.0.0.0/8 on lo; choose another ",
        ),
        (["--egress-interface", "none0"], 2, r"--egress-interface: there is no interface 'none0'; this host has .*lo"),
    ],
)
def test_a_network_that_this_machine_cannot_have_is_refused_before_anything_is_written(
    up: Up, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    done = up(*arguments)
    assert (done.code, done.out) == (code, "")
    assert re.fullmatch(f"fuse: {words}.*\n", done.err), done.err
    assert files(tmp_path) == set()


def test_without_qemu_nothing_is_begun(up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/none")
    monkeypatch.setattr("fusevm.host.vmm.launch.SYSTEM_PATH", ())
    done = up()
    assert done.code == 5
    assert done.err.startswith("fuse: qemu-system-x86_64 is not installed; install it with `apt-get")
    assert files(tmp_path) == set()


def test_a_folder_in_use_is_left_alone(up: Up, tmp_path: Path) -> None:
    places = Places(data=tmp_path / "data")
    make_folders(places)
    with take_lock(places):
        before = files(tmp_path)
        done = up(data=places.data)
        assert files(tmp_path) == before
    assert done.code == 4
    assert done.err.startswith(f"fuse: {places.data} is in use by another process")


def test_an_ephemeral_start_that_is_refused_takes_its_folder_along(up: Up, environ: pytest.MonkeyPatch) -> None:
    del up
    made: list[Path] = []

    def somewhere(**names: str | None) -> str:
        folder = Path(environ_folder, f"{names['prefix']}x")
        folder.mkdir()
        made.append(folder)
        return str(folder)

    environ_folder = os.environ["XDG_CONFIG_HOME"]
    Path(environ_folder).mkdir()
    environ.setattr("tempfile.mkdtemp", somewhere)
    assert main.run(("up", "--ephemeral", "--image", "no-such-image")) == 2
    assert made
    assert not made[0].exists()


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A run directory that another daemon uses. Its path is short, because those of sockets are."""
    folder = Path(tempfile.mkdtemp(prefix="fu-", dir="/var/tmp"))
    fd = lock_directory(folder)
    yield folder
    os.close(fd)
    shutil.rmtree(folder)


def start(places: Places, **flags: str) -> None:
    """Start real daemons, without what machines are made from."""
    host = settings.load("host", {"instance": f"u{os.getpid()}", **flags}, {})
    with Installation(places, settings.load("control", {}, {}), host, say=print) as installed:
        installed.start()


def test_what_a_daemon_refuses_is_passed_on_and_leaves_nothing(
    environ: pytest.MonkeyPatch, tmp_path: Path, run_dir: Path
) -> None:
    before = files(tmp_path)
    with pytest.raises(CliError) as caught:
        start(Places(data=tmp_path / "far/data"), run_dir=str(run_dir))
    assert caught.value.code == 4
    assert str(caught.value).startswith(f"{run_dir} is in use by another process (pid {os.getpid()})")
    assert files(tmp_path) == before


def test_a_refused_start_keeps_what_was_there(environ: pytest.MonkeyPatch, tmp_path: Path, run_dir: Path) -> None:
    places = Places(data=tmp_path / "data")
    make_folders(places)
    (places.control / "fuse.db").write_text("precious")
    before = files(tmp_path)
    with pytest.raises(CliError):
        start(places, run_dir=str(run_dir))
    assert files(tmp_path) - before == {"data/log/host.log"}


def fail_late(places: Places, error: Exception) -> None:
    """A start that has made its folders and a kernel when it fails."""
    with Installation(places, settings.load("control", {}, {}), settings.load("host", {}, {}), say=print):
        (places.data / "kernels").mkdir()
        (places.logs / "host.log").touch()
        raise error


def test_a_start_that_is_refused_late_keeps_only_kernels_and_images(tmp_path: Path) -> None:
    with pytest.raises(KernelCorrupt):
        fail_late(Places(data=tmp_path / "far/data"), KernelCorrupt(path="k", problem="it is too short"))
    assert files(tmp_path) == {"far", "far/data", "far/data/kernels"}


def test_a_start_that_fails_for_an_unknown_reason_leaves_its_logs(tmp_path: Path) -> None:
    places = Places(data=tmp_path / "data")
    with pytest.raises(StartFailed):
        fail_late(places, StartFailed("it crashed", hint="its log"))
    assert (places.logs / "host.log").exists()
    assert not places.record.exists()
