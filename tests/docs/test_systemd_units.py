"""The systemd units start commands that exist, with settings that exist, and keep what machines rely on."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fusevm.cli import install, settings
from fusevm.cli.install.observe import read_units
from fusevm.cli.main import cli
from fusevm.cli.options import State
from fusevm.cli.serve import control_config
from fusevm.control.config import check
from fusevm.control.store.location import sqlite_path

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = {path.stem: path for path in sorted((DEPLOY / "systemd").glob("*.service"))}
FUSE = "/usr/local/bin/fuse"
#: What the administrator puts into control.env.
SECRETS = {
    "ORCH_AUTH_TOKEN": "a" * 64,
    "TOKEN_ENCRYPTION_KEY": "b" * 64,
    "FIRECRACKER_BASE_URL": "https://127.0.0.1:8090",
    "FIRECRACKER_TOKEN": f"secret.{'c' * 64}",
}
#: systemd-analyze makes folders below /run, where no systemd runs.
APART = ["unshare", "--mount", "--propagation=private", "sh", "-c", 'mount -t tmpfs fuse-test /run && exec "$@"', "sh"]
#: Each gives a service a mount namespace of its own (systemd.exec(5)); so do all that begin with `Protect`, but for
#: ProtectClock and ProtectHostname, which the host daemon does not have either.
MOUNT_NAMESPACE = re.compile(
    r"Protect.*|Private(Tmp|Devices|Mounts|Users|IPC|Network)|ProcSubset|Root(Directory|Image).*|DynamicUser|"
    r"(Read(Write|Only)|Inaccessible|Exec|NoExec|Bind|BindReadOnly)Paths|TemporaryFileSystem|MountAPIVFS|"
    r"(Mount|Extension)(Images|Flags|Directories)|LoadCredential.*|SetCredential.*|LogNamespace"
)


def read_unit(name: str) -> dict[str, list[str]]:
    """All assignments of a unit, by name."""
    found: dict[str, list[str]] = {}
    for line in UNITS[name].read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def environment_of(name: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in read_unit(name).get("Environment", []))


def parse(words: list[str]) -> tuple[click.Command, dict[str, object]]:
    """Read a command line as `fuse` does, and carry nothing out."""
    command: click.Command = cli
    context = command.make_context("fuse", list(words), obj=State(environ={}))
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, found.make_context(name, rest, parent=context)
    return command, context.params


def test_there_are_these_units_and_the_page_tells_of_each():
    assert set(UNITS) == {"fuse-host", "fuse-control"}
    page = (DEPLOY / "README.md").read_text()
    assert all(f"systemd/{path.name}" in page for path in UNITS.values())


@pytest.mark.parametrize(("name", "path"), [("fuse-host", "host serve"), ("fuse-control", "serve")])
def test_what_a_unit_starts_is_a_command_with_its_options(name: str, path: str):
    (line,) = read_unit(name)["ExecStart"]
    program, *words = shlex.split(line)
    assert program == FUSE
    assert words[: len(path.split())] == path.split()
    command, _ = parse(words)
    assert command.name == "serve"
    with pytest.raises(click.NoSuchOption):
        parse([*words, "--no-such-option"])


def test_the_host_daemon_works_where_images_are_built_by_default():
    (line,) = read_unit("fuse-host")["ExecStart"]
    _, given = parse(shlex.split(line)[1:])
    assert given["data"] == str(settings.default_data_root({}, is_root=True))


def test_the_control_plane_starts_with_the_secrets_of_the_page_and_not_without():
    environ = environment_of("fuse-control")
    config = control_config(settings.load("control", {}, {**environ, **SECRETS}))
    check(config)
    assert config.require_auth
    folder = read_unit("fuse-control")["StateDirectory"][0]
    assert Path(sqlite_path(config.database)).parent == Path("/var/lib") / folder
    for name in ("ORCH_AUTH_TOKEN", "TOKEN_ENCRYPTION_KEY"):
        left = {key: value for key, value in SECRETS.items() if key != name}
        with pytest.raises(Exception, match="also set"):
            check(control_config(settings.load("control", {}, {**environ, **left})))


@pytest.mark.parametrize("source", ["README.md", *(f"systemd/{path.name}" for path in UNITS.values())])
def test_every_variable_that_is_named_is_a_setting(source: str):
    known = {setting.env for table in settings.SECTIONS.values() for setting in table}
    known |= {"FUSE_BASE_URL", "FUSE_TOKEN"}  # of clients
    named = set(
        re.findall(r"\b(?:ORCH|FUSE|FIRECRACKER|TOKEN|DATABASE|AGENT)_[A-Z_]+\b", (DEPLOY / source).read_text())
    )
    assert named <= known
    if source == "README.md":
        assert set(SECRETS) <= named


def test_the_page_links_to_the_units_that_are_installed():
    assert (DEPLOY / "systemd").resolve() == Path(install.__file__).parent / "systemd"
    assert read_units() == {path.name: path.read_text() for path in UNITS.values()}


def test_machines_outlive_the_host_daemon():
    unit = read_unit("fuse-host")
    assert unit["KillMode"] == ["process"]
    assert unit["Delegate"] == ["yes"]
    assert unit["OOMPolicy"] == ["continue"]
    # systemd would empty these at a stop, with the sockets of running machines.
    assert not {"RuntimeDirectory", "StateDirectory", "CacheDirectory"} & set(unit)
    # QEMU without KVM makes code at run time.
    assert "MemoryDenyWriteExecute" not in unit


def test_the_host_daemon_stays_in_the_mount_namespace_of_the_server():
    assert [key for key in read_unit("fuse-host") if MOUNT_NAMESPACE.fullmatch(key)] == []
    assert len([key for key in read_unit("fuse-control") if MOUNT_NAMESPACE.fullmatch(key)]) > 5, "the list works"


@pytest.fixture
def analyze() -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed (package systemd)")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    if int(re.match(r"\d+", version)[0]) < 250:
        pytest.skip(f"systemd-analyze {version} cannot look at single units; 250 or newer is needed")
    return program


def installed(name: str, folder: Path) -> Path:
    """A copy of the unit for a machine where `fuse` is the one of this interpreter."""
    unit = folder / UNITS[name].name
    unit.write_text(UNITS[name].read_text().replace(FUSE, str(Path(sys.executable).with_name("fuse"))))
    return unit


def run_analyze(program: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "SYSTEMD_COLORS": "0", "SYSTEMD_EMOJI": "0"}
    words = [*(APART if os.geteuid() == 0 else ()), program, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environ)


@pytest.mark.parametrize("name", UNITS)
def test_systemd_has_nothing_to_object_to(analyze: str, tmp_path: Path, name: str):
    done = run_analyze(analyze, "verify", "--recursive-errors=no", "--man=no", installed(name, tmp_path))
    ours = [line for line in done.stderr.splitlines() if "fuse" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


def test_systemd_would_object_to_a_misspelt_option(analyze: str, tmp_path: Path):
    unit = installed("fuse-host", tmp_path)
    unit.write_text(unit.read_text().replace("KillMode=process", "KillMode=processes"))
    said = run_analyze(analyze, "verify", "--recursive-errors=no", "--man=no", unit).stderr
    assert "fuse-host.service:" in said
    assert "processes" in said


@pytest.mark.parametrize(("name", "most"), [("fuse-host", 60), ("fuse-control", 15)])
def test_the_units_are_as_closed_as_they_can_be(analyze: str, name: str, most: int):
    done = run_analyze(analyze, "security", "--offline=true", f"--threshold={most}", UNITS[name])
    assert done.returncode == 0, done.stdout
    (score,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert f"`{name}` {score}" in (DEPLOY / "README.md").read_text(), "the page tells the score"
