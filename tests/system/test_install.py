"""Installing under a real systemd, with a real journal: from a bare machine to a serving host, and back to nothing."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import pty
import re
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import systemd_world
from fusevm.cli.install.env_file import parse_env
from fusevm.cli.install.observe import read_units
from fusevm.cli.install.session import DEFAULT_DATABASE
from fusevm.host.vmm.firecracker.pins import KERNELS, RELEASES, VERSION_TEXT
from own_world import run_prefix
from systemd_world import ENVIRON, SHARED, World

_spec = importlib.util.spec_from_file_location(
    "bzimages", Path(__file__).parents[1] / "unit" / "host" / "images" / "test_bzimage.py"
)
bzimages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bzimages)

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]
RELEASE, KERNEL = RELEASES["x86_64"].name, KERNELS["x86_64"].name
PORT = 8099
UNITS = read_units()
#: Says what a command is about to do, and kills itself after so many of its steps.
KILLED = """
import json, os, signal, sys
from fusevm.cli.install import perform, plan, session
command, left, seen, driver, mirror, *digests = sys.argv[1:]
class Killed(perform.Performer):
    left = int(left)
    async def perform(self, step):
        await super().perform(step)
        Killed.left -= step.describe() not in json.loads(seen)
        if Killed.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
host = lambda: session.open_host(
    {"source": None, "mirror": mirror, "digests": tuple(digests), "image": "", "driver": driver or None})
def say(steps):
    print(*(step.describe() for step in steps), sep="\\n", flush=True)
    return steps
match command:
    case "install-control":
        control = session.open_control(listen=None, tls=None)
        control.choose_database(session.DEFAULT_DATABASE)
        say(control.plan()) and control.carry_out(Killed)
    case "uninstall":
        removal = session.open_removal(keeps_data=False)
        say(removal.plan()) and removal.carry_out(Killed, is_forced=False)
    case _:
        kinds = {"install": "plan_host", "install-service": "plan_service", "upgrade": "plan_upgrade"}
        planner = getattr(plan, kinds[command])
        say(host().plan(planner)) and host().carry_out(planner, Killed)
"""


def make_release(version: str = VERSION_TEXT) -> bytes:
    """An archive as the origin's, with programs that say their version."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in ("firecracker", "jailer"):
            text = f"#!/bin/sh\necho '{name.capitalize()} v{version}'\n".encode()
            member = tarfile.TarInfo(f"release-v{version}-x86_64/{name}-v{version}-x86_64")
            member.size, member.mode = len(text), 0o755
            archive.addfile(member, io.BytesIO(text))
        evil = tarfile.TarInfo("../../../etc/evil")
        archive.addfile(evil, io.BytesIO())
    return packed.getvalue()


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a mirror of the pinned files has; their digests are not the pinned ones."""
    folder = tmp_path_factory.mktemp("mirror")
    (folder / RELEASE).write_bytes(make_release())
    (folder / KERNEL).write_bytes(bzimages.make_elf())
    return folder


def digests(mirror: Path) -> list[str]:
    """The options that name them."""
    names = (RELEASE, KERNEL)
    return [f"{name}={hashlib.sha256((mirror / name).read_bytes()).hexdigest()}" for name in names]


@contextlib.contextmanager
def booted(folder: Path, mirror: Path) -> Iterator[World]:
    if os.geteuid() != 0:
        pytest.skip("needs root for namespaces of its own")
    with systemd_world.running(folder, f"{run_prefix()}sd", mirror) as world:
        command = ["python3", "-m", "http.server", str(PORT), "--bind", "127.0.0.1", "--directory", str(SHARED)]
        world.run("systemd-run", "--unit=mirror", *command)
        # Debian's kernel is not here: one that was stored before.
        stored = "import asyncio, pathlib, sys; from fusevm.host.images.kernel import KernelStore, DEFAULT\n"
        stored += "store = KernelStore(pathlib.Path('/var/lib/fuse'))\n"
        stored += f"kernel = asyncio.run(store.ensure(pathlib.Path('{SHARED / KERNEL}')))\n"
        stored += "store._names.set(DEFAULT, kernel.digest)\n"
        world.run("/opt/fuse/old/bin/python", "-c", stored)
        yield world


@pytest.fixture
def world(tmp_path: Path, mirror: Path) -> Iterator[World]:
    with booted(tmp_path, mirror) as world:
        yield world


def install(
    world: World, mirror: Path, *more: str, program: str = "old", check: bool = True
) -> "subprocess.CompletedProcess[str]":
    named = [word for pair in digests(mirror) for word in ("--sha256", pair)]
    words = ["host", "install", "--image", "", "--mirror", f"http://127.0.0.1:{PORT}", *named, *more]
    return world.fuse(*words, program=program, check=check)


def on_terminal(world: World, answer: str, *words: str) -> tuple[str, str]:
    """Run `fuse` at a terminal with one line typed; standard output, and what was on the terminal."""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        os.write(ours, answer.encode() + b"\n")
        command = world.words("/opt/fuse/old/bin/fuse", *words)
        try:
            done = subprocess.run(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=ENVIRON, check=True)
        finally:
            os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while read := terminal.read(65536):
                shown += read
    return done.stdout.decode(), shown.decode()


def lines(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines())


def test_a_bare_machine_becomes_a_serving_host_and_is_bare_again(world: World, mirror: Path):
    planned = install(world, mirror, "--plan").stdout
    assert "daemon-reload" in planned
    assert not world.exists("/etc/fuse")

    said = lines(install(world, mirror).stdout)
    assert set(said) == {"FIRECRACKER_BASE_URL", "FIRECRACKER_TOKEN"}
    assert said["FIRECRACKER_BASE_URL"] == "https://127.0.0.1:8090"
    assert said["FIRECRACKER_TOKEN"] == world.read("/var/lib/fuse/host/token").strip()
    assert world.show("fuse-host", "ActiveState") == "active"
    assert world.show("fuse-host", "UnitFileState") == "enabled"
    assert not world.exists("/var/lib/fuse/downloads")
    assert not world.exists("/etc/evil")
    program = parse_env(world.read("/etc/fuse/host.env"))["FIRECRACKER_BINARY_PATH"]
    assert world.run(program, "--version").stdout.strip() == f"Firecracker v{VERSION_TEXT}"
    # Pasted into a shell, the lines are variables.
    pasted = world.run(
        "sh", "-c", f"export {' '.join(f'{k}={v}' for k, v in said.items())}; echo $FIRECRACKER_BASE_URL"
    )
    assert pasted.stdout.strip() == said["FIRECRACKER_BASE_URL"]

    pid = world.show("fuse-host", "MainPID")
    assert install(world, mirror, "--plan").stdout.strip() == "nothing is to be done"
    assert lines(install(world, mirror).stdout) == said
    assert world.show("fuse-host", "MainPID") == pid

    done = world.fuse("host", "install-control", env={"DATABASE_URL": ""})
    assert f"DATABASE_URL is not given: {DEFAULT_DATABASE} is used" in done.stderr.splitlines()
    clients = lines(done.stdout)
    assert set(clients) == {"FUSE_BASE_URL", "FUSE_TOKEN"}
    listed = world.fuse("host", "list", "-o", "json", env=clients).stdout
    assert '"default"' in listed
    settings = parse_env(world.read("/etc/fuse/control.env"))
    assert (settings["ORCH_REQUIRE_AUTH"], settings["FIRECRACKER_TOKEN"]) == ("true", said["FIRECRACKER_TOKEN"])
    assert len(settings["TOKEN_ENCRYPTION_KEY"]) == 64
    assert world.path("/etc/fuse/control.env").stat().st_mode & 0o777 == 0o600
    assert lines(world.fuse("host", "install-control").stdout) == clients
    assert parse_env(world.read("/etc/fuse/control.env")) == settings

    world.fuse("host", "uninstall")
    check_bare(world)


def killed(
    world: World,
    command: str,
    *more: str,
    program: str = "old",
    steps: int = 1,
    driver: str = "qemu",
    seen: Sequence[str] = (),
) -> "subprocess.CompletedProcess[str]":
    """Run a command that is killed after some steps; those in `seen` do not count."""
    words = [command, str(steps), json.dumps(list(seen)), driver, *(more or ("",))]
    return world.run(f"/opt/fuse/{program}/bin/python", "-B", "-c", KILLED, *words, check=False)


def kill_after_each_step(world: World, command: str, program: str = "old") -> list[str]:
    """Run a command again and again, killed after the first step not seen yet, until nothing is left; its steps.

    None does anything that an undisturbed run would not have done.
    """
    planned, seen = list[str](), list[str]()
    while world.exists(f"/opt/fuse/{program}"):
        done = killed(world, command, program=program, seen=seen)
        left = done.stdout.splitlines()
        planned = planned or left
        if left == [""]:
            break
        if (done.returncode, done.stderr) == (0, ""):
            continue  # all that was left was to wait, and that was over
        assert done.returncode in (-9, 137), (left, done.stderr)
        assert set(left) <= set(planned)
        seen.append(done.stderr.splitlines()[-1])
    missed = [step for step in planned if step not in seen]
    assert [step for step in missed if not is_passing(step)] == []
    return planned


def is_passing(step: str) -> bool:
    """May a step be needless by the time at which a killed run is repeated?"""
    # What is waited for has come; systemd had not loaded the unit; the end of all machines took the folder along.
    return step.startswith("wait until") or step in ("systemctl daemon-reload", "remove /run/fuse")


def test_killed_after_every_step_it_is_finished_by_the_next_run(world: World, mirror: Path):
    plan, steps = install(world, mirror, "--plan").stdout, 1
    planned, last_steps = set(plan.splitlines()), list[str]()
    while plan.strip() != "nothing is to be done":
        done = killed(world, "install", f"http://127.0.0.1:{PORT}", *digests(mirror), steps=steps, driver="")
        if (done.returncode, done.stderr) == (0, ""):
            break  # all that was left was to wait, and that was over
        assert done.returncode in (-9, 137), (done.stdout, done.stderr)
        before, plan = plan, install(world, mirror, "--plan").stdout
        # A file that was fetched stays in the plan, and is not fetched again, until it is unpacked.
        steps = 2 if plan == before and steps == 1 else 1
        last_steps.append(done.stderr.splitlines()[-1])
        assert len(last_steps) <= 30, plan
    assert all(map(is_passing, planned - set(last_steps)))
    said = lines(install(world, mirror).stdout)
    assert said["FIRECRACKER_TOKEN"] == world.read("/var/lib/fuse/host/token").strip()
    assert world.show("fuse-host", "ActiveState") == "active"


def test_every_other_command_is_finished_by_the_next_run_too(world: World, mirror: Path):
    """install-service, install-control, upgrade and uninstall, killed after every step of theirs."""
    assert "systemctl enable fuse-host.service" in kill_after_each_step(world, "install-service")
    assert world.show("fuse-host", "ActiveState") == "inactive"
    host = lines(world.fuse("host", "start", "--driver", "qemu").stdout)
    assert host["FIRECRACKER_TOKEN"] == world.read("/var/lib/fuse/host/token").strip()

    world.path("/etc/fuse/control.env").write_text("# ours\nORCH_AUTH_TOKEN=kept\n")
    assert "systemctl restart fuse-control.service" in kill_after_each_step(world, "install-control")
    settings = parse_env(world.read("/etc/fuse/control.env"))
    assert (settings["ORCH_AUTH_TOKEN"], settings["FIRECRACKER_TOKEN"]) == ("kept", host["FIRECRACKER_TOKEN"])
    clients = lines(world.fuse("host", "install-control").stdout)
    assert clients["FUSE_TOKEN"] == "kept"
    assert parse_env(world.read("/etc/fuse/control.env")) == settings
    installed = {"control.env", "host.env"}
    assert names(world, "/etc/fuse") == installed

    pids = [world.show(unit, "MainPID") for unit in ("fuse-host", "fuse-control")]
    assert "remove /opt/fuse/old" in kill_after_each_step(world, "upgrade", "new")
    assert str(world.path("/usr/local/bin/fuse").readlink()) == "/opt/fuse/new/bin/fuse"
    assert names(world, "/opt/fuse") == {"new"}
    assert names(world, "/etc/fuse") == installed
    assert not set(pids) & {world.show(unit, "MainPID") for unit in ("fuse-host", "fuse-control")}
    assert "default" in world.fuse("host", "list", program="new", env=clients).stdout
    assert parse_env(world.read("/etc/fuse/control.env")) == settings

    assert "remove /var/lib/fuse" in kill_after_each_step(world, "uninstall", "new")
    # Killed while it removed itself, there is no `fuse` to repeat it with.
    script = world.path("/srv/install.sh")
    script.write_bytes((Path(__file__).parents[2] / "deploy" / "install.sh").read_bytes())
    world.run("mkdir", "-p", "/opt/.fuse.removed/new")
    world.path("/usr/local/bin/fuse").symlink_to("/opt/fuse/new/bin/fuse")
    world.run("sh", "/srv/install.sh", "uninstall")
    check_bare(world)


#: A package that kills apt and who has called it, as soon as its program is there; at the next try it is well.
APT_REPOSITORY = """
set -eu
mkdir -p /srv/repo /srv/tree/DEBIAN /srv/tree/usr/bin
printf '#!/bin/sh\\n' >/srv/tree/usr/bin/lz4
cat >/srv/tree/DEBIAN/postinst <<'END'
#!/bin/sh
[ -e /srv/was-killed ] && exit 0
touch /srv/was-killed
pkill -9 -f 'host install'
kill -9 "$PPID"
END
chmod 755 /srv/tree/usr/bin/lz4 /srv/tree/DEBIAN/postinst
control="Package: lz4\\nVersion: 99\\nArchitecture: all\\nMaintainer: me <me@example.com>\\nDescription: probe\\n"
printf "$control" >/srv/tree/DEBIAN/control
dpkg-deb -b /srv/tree /srv/repo/lz4.deb >/dev/null
cd /srv/repo
size=$(stat -c %s lz4.deb) sum=$(sha256sum lz4.deb | cut -d' ' -f1)
printf "${control}Filename: ./lz4.deb\\nSize: $size\\nSHA256: $sum\\n" >Packages
rm -rf /etc/apt/sources.list.d /var/lib/apt/lists
mkdir -p /etc/apt/sources.list.d /var/lib/apt/lists/partial
echo 'deb [trusted=yes] file:/srv/repo ./' >/etc/apt/sources.list
rm -f /usr/bin/lz4
"""


def test_killed_within_a_package_it_is_installed_by_the_next_run(world: World, mirror: Path):
    world.run("sh", "-c", APT_REPOSITORY)
    assert "install with apt: lz4" in install(world, mirror, "--driver", "qemu", "--plan").stdout.splitlines()
    done = install(world, mirror, "--driver", "qemu", check=False)
    assert done.returncode in (-9, 137), done.stderr
    assert world.exists("/srv/was-killed")
    assert world.exists("/usr/bin/lz4")  # there is nothing to be seen of it but in dpkg's records
    assert "install with apt: lz4" in install(world, mirror, "--driver", "qemu", "--plan").stdout.splitlines()
    assert "FIRECRACKER_TOKEN=" in install(world, mirror, "--driver", "qemu").stdout
    state = world.run("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", "lz4").stdout
    assert state == "installed 99"
    assert world.run("dpkg", "--audit").stdout == ""
    assert install(world, mirror, "--driver", "qemu", "--plan").stdout.strip() == "nothing is to be done"


def names(world: World, folder: str) -> set[str]:
    return {path.name for path in world.path(folder).iterdir()}


def check_bare(world: World) -> None:
    """Nothing of an installation is left."""
    gone = ["/etc/fuse", "/var/lib/fuse", "/run/fuse", "/usr/local/bin/fuse", "/opt/fuse", "/run/fuse-install.lock"]
    gone += ["/var/lib/fuse-control", "/var/lib/private/fuse-control"]
    for path in gone:
        assert not world.exists(path), path
    for folder in ("/etc", "/opt", "/var/lib", "/run", "/usr/local/bin", "/etc/systemd/system"):
        assert not [name for name in names(world, folder) if "fuse" in name], folder
    assert world.run("ip", "-o", "link").stdout.count("\n") == 1
    assert world.run("nft", "list", "ruleset").stdout == ""
    assert world.run("sh", "-c", "ls /run/netns 2>/dev/null || true").stdout == ""
    for unit in UNITS:
        assert world.show(unit, "LoadState") == "not-found"


#: The installed unit, with a daemon whose VMMs are small processes with the real agent.
SMALL_VMMS = """[Service]
ExecStart=
ExecStart=/opt/fuse/old/bin/python -B -m fusevm.testing.agent_daemon --data-root /var/lib/fuse/host \\
  --artefact-root /var/lib/fuse --run-dir /run/fuse --listen 127.0.0.1:0 --disk-reserve-bytes 1 --ram-reserve-mib 1
"""
#: An image of a user and nothing else: commands of such a machine are the host's.
SMALL_IMAGE = """
import asyncio, pathlib
from fusevm.host.images.build import build_from_tree
from fusevm.host.images.store import ImageConfig, ImageStore
tree = pathlib.Path("/srv/tree")
(tree / "etc").mkdir(parents=True)
(tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\\n")
asyncio.run(build_from_tree(ImageStore(pathlib.Path("/var/lib/fuse")), "small", tree, config=ImageConfig()))
"""


def test_a_machines_life_is_one_field_of_the_journal(world: World, mirror: Path):
    install(world, mirror, "--driver", "qemu")
    world.run("/opt/fuse/old/bin/python", "-c", SMALL_IMAGE)
    world.run("mkdir", "-p", "/etc/systemd/system/fuse-host.service.d")
    world.path("/etc/systemd/system/fuse-host.service.d/test.conf").write_text(SMALL_VMMS)
    world.run("systemctl", "daemon-reload")
    world.run("systemctl", "restart", "fuse-host")
    socket = "/var/lib/fuse/host/firecracker-host.sock"
    patience = ["--retry", "60", "--retry-delay", "1", "--retry-all-errors"]
    world.run("curl", "-sf", *patience, "--unix-socket", socket, "http://localhost/health")

    def ask(method: str, path: str, body: object = None) -> dict[str, Any]:
        data = [] if body is None else ["-d", json.dumps(body)]
        url = f"http://localhost{path}"
        said = world.run("curl", "-sS", "--fail-with-body", "--unix-socket", socket, "-X", method, url, *data).stdout
        return json.loads(said) if said else {}

    for machine in ("m-one", "m-two"):
        spec = {"image": "small", "memory_mib": 64, "disk_bytes": 64 << 20, "hostname": "box"}
        ask("POST", "/machines", {"machine_id": machine, "spec": spec, "boot_timeout_ms": 120_000})
    ask("POST", "/machines/m-one/exec", {"command": ["true"], "user": "root"})
    ask("POST", "/machines/m-one/stop")
    ask("POST", "/machines/m-one/start")
    world.run("systemctl", "restart", "fuse-host")
    world.run("curl", "-sf", *patience, "--unix-socket", socket, "http://localhost/health")
    lived = [line for line in life_of(world, "m-one") if line.startswith("machine_")]
    world.run("kill", "-9", *pids_of(world, "m-one"))
    for _ in range(600):
        if ask("GET", "/machines/m-one")["machine"]["phase"] == "failed":
            break
        time.sleep(0.1)
    ask("DELETE", "/machines/m-one")
    run = ["machine_phase creating", "machine_phase running"]
    assert lived == [*run, "machine_phase stopped", *run, "machine_phase running", "machine_adopted"]
    life = life_of(world, "m-one")
    ended = [line for line in life if line.startswith("machine_")][len(lived) :]
    assert ended == ["machine_phase failed", "machine_exited failed", "machine_phase deleting", "machine_gone deleting"]
    requests = [f"request POST /machines/m-one/{what}" for what in ("exec", "stop", "start")]
    assert [line for line in life if line.startswith(("request POST", "request DELETE"))] == [
        *requests,
        "request DELETE /machines/m-one",
    ]
    assert not [line for line in life if "m-two" in line]
    assert [line for line in life_of(world, "m-two") if line.startswith("machine_")][:2] == run
    # The rest is in the journal, too, with its level.
    ready = world.journal("-o", "json", "-u", "fuse-host", "FUSE_EVENT=ready").splitlines()
    assert {json.loads(line)["PRIORITY"] for line in ready} == {"6"}


def pids_of(world: World, machine: str) -> list[str]:
    """Of its VMM, as the journal says."""
    found = world.journal("-o", "json", f"FUSE_MACHINE={machine}", "FUSE_EVENT=machine_phase").splitlines()
    return [json.loads(line)["FUSE_PID"] for line in found if json.loads(line)["FUSE_PHASE"] == "running"][-1:]


def life_of(world: World, machine: str) -> list[str]:
    """What the journal has under a machine's field: event, and phase or request."""
    found = [json.loads(line) for line in world.journal("-o", "json", f"FUSE_MACHINE={machine}").splitlines()]
    assert {one["_SYSTEMD_UNIT"] for one in found} <= {"fuse-host.service"}
    names = ("FUSE_EVENT", "FUSE_METHOD", "FUSE_PATH", "FUSE_PHASE")
    return [" ".join(one[name] for name in names if name in one) for one in found]


def test_a_file_with_another_digest_stops_the_installation_and_is_not_kept(world: World, mirror: Path):
    """The mirror's files are not the pinned ones, and nobody has said that they may differ."""
    done = world.fuse("host", "install", "--image", "", "--mirror", f"http://127.0.0.1:{PORT}", check=False)
    assert done.returncode == 2
    assert RELEASES["x86_64"].sha256 in done.stderr
    assert world.run("find", "/var/lib/fuse/downloads", "-type", "f").stdout == ""
    assert not world.exists("/var/lib/fuse/firecracker")
    assert not world.exists("/etc/systemd/system/fuse-host.service")
    brought = world.fuse("host", "install", "--image", "", "--from", str(SHARED), check=False)
    assert brought.returncode == 2
    assert str(SHARED / RELEASE) in brought.stderr


def test_files_that_were_brought_here_need_no_network(world: World, mirror: Path):
    world.run("systemctl", "stop", "mirror")
    named = [word for pair in digests(mirror) for word in ("--sha256", pair)]
    said = world.fuse("host", "install", "--image", "", "--from", str(SHARED), *named)
    assert "FIRECRACKER_TOKEN=" in said.stdout
    assert "download http" not in said.stderr


def test_who_may_speak_to_an_installed_daemon_is_root_or_has_the_token(world: World, mirror: Path):
    install(world, mirror, "--driver", "qemu")
    socket = "/var/lib/fuse/host/firecracker-host.sock"
    assert world.path(socket).stat().st_mode & 0o077 == 0
    assert world.path("/var/lib/fuse/host").stat().st_mode & 0o077 in (0, 0o11)
    ask = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-k", "https://127.0.0.1:8090/machines"]
    assert world.run(*ask).stdout == "401"
    secret = world.read("/var/lib/fuse/host/token").partition(".")[0]
    assert world.run(*ask, "-H", f"Authorization: Bearer {secret}").stdout == "200"
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    assert world.run(
        *nobody, "curl", "-s", "--unix-socket", socket, "http://localhost/machines", check=False
    ).returncode


def test_a_new_program_that_does_not_serve_is_taken_back(world: World, mirror: Path):
    install(world, mirror, "--driver", "qemu")
    script = world.path("/opt/fuse/new/bin/fuse")
    script.write_text(
        script.read_text().replace("main()", "import sys\nsys.exit(9) if 'serve' in sys.argv else main()", 1)
    )
    # Of an upgrade that never served, and whose program was removed by hand: it leads nowhere.
    world.run("ln", "-s", "/opt/fuse/gone/bin/fuse", "/etc/fuse/previous")
    # Killed when the new program is linked already: the next run still knows which one served.
    assert killed(world, "upgrade", program="new", steps=2).returncode in (-9, 137)
    assert str(world.path("/usr/local/bin/fuse").readlink()) == "/opt/fuse/new/bin/fuse"
    done = world.fuse("host", "upgrade", "--image", "", program="new", check=False)
    assert done.returncode == 5, done.stderr
    assert "/opt/fuse/old/bin/fuse is put back" in done.stderr
    assert str(world.path("/usr/local/bin/fuse").readlink()) == "/opt/fuse/old/bin/fuse"
    assert world.show("fuse-host", "ActiveState") == "active"
    assert world.exists("/opt/fuse/old/bin/fuse")
    assert not world.exists("/etc/fuse/previous")


def test_on_a_terminal_the_control_plane_asks_for_its_database_and_for_nothing_else(world: World, mirror: Path):
    install(world, mirror, "--driver", "qemu")
    mine = "sqlite:///var/lib/fuse-control/mine.db"
    said, shown = on_terminal(world, mine, "host", "install-control")
    assert shown.count(f"DATABASE_URL [{DEFAULT_DATABASE}]: ") == 1
    assert set(lines(said)) == {"FUSE_BASE_URL", "FUSE_TOKEN"}
    assert parse_env(world.read("/etc/fuse/control.env"))["DATABASE_URL"] == mine
    assert world.exists("/var/lib/private/fuse-control/mine.db")
    # What was answered is kept: a repetition asks nothing.
    again, shown = on_terminal(world, "sqlite:///var/lib/fuse-control/other.db", "host", "install-control")
    assert lines(again) == lines(said)
    assert "DATABASE_URL [" not in shown
    # An empty line takes what is offered.
    world.path("/etc/fuse/control.env").unlink()
    on_terminal(world, "", "host", "install-control")
    assert parse_env(world.read("/etc/fuse/control.env"))["DATABASE_URL"] == DEFAULT_DATABASE


def test_the_control_plane_serves_with_a_key_that_only_root_can_read(world: World, mirror: Path):
    install(world, mirror, "--driver", "qemu")
    key, cert = "/etc/ssl/private/fuse.key", "/etc/ssl/fuse.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    world.run("mkdir", "-p", "/etc/ssl/private")
    world.run(*make, "-keyout", key, "-out", cert, *subject)
    world.path(key).chmod(0o600)
    clients = lines(world.fuse("host", "install-control", "--tls-cert", cert, "--tls-key", key).stdout)
    assert clients["FUSE_BASE_URL"] == "https://localhost:8080"
    listed = world.fuse("host", "list", env={**clients, "FUSE_CA_FILE": cert})
    assert "default" in listed.stdout
    pid = world.show("fuse-control", "MainPID")
    assert world.read(f"/proc/{pid}/status").split("Uid:")[1].split()[0] != "0"
    # A repetition without the certificate keeps it.
    assert lines(world.fuse("host", "install-control").stdout) == clients
    assert world.show("fuse-control", "MainPID") == pid


def test_the_daemons_unit_allows_what_a_jailer_does(world: World):
    """Device nodes in a jail, a root of its own, namespaces, another user and where that is: within what it forbids."""
    work = [
        "mkdir /var/lib/fuse-probe",
        "mknod /var/lib/fuse-probe/tun c 10 200",
        "mknod /var/lib/fuse-probe/urandom c 1 9",
        "head -c 1 /var/lib/fuse-probe/urandom >/dev/null",
        "unshare --mount true",
        "chroot / true",
        "{ setpriv --reuid 200001 --regid 200001 --clear-groups sleep 600 & }",
        'until [ "$$(stat -c %%u /proc/$$!)" = 200001 ]; do sleep 0.1; done',
        "stat /proc/$$!/root/. >/dev/null",
        "kill $$!",
        "unshare --net true",
        "unshare --ipc true",
        "! unshare --user true",
        "! mknod /var/lib/fuse-probe/disk b 8 0",
        "echo --done--",
    ]
    command = f"ExecStart=/bin/sh -exc '{'; '.join(work)}'"
    unit = re.sub(r"^ExecStart=.*$", command, UNITS["fuse-host.service"], flags=re.MULTILINE)
    unit = unit.replace("Restart=on-failure", "Restart=no").replace("Type=exec", "Type=oneshot")
    units = {
        "enough": unit,
        "no-nodes": unit.replace("CAP_MKNOD", "").replace("-probe", "-probe2"),
        "blind": unit.replace("CAP_SYS_PTRACE", "").replace("-probe", "-probe3"),
    }
    for name, text in units.items():
        world.path(f"/etc/systemd/system/{name}.service").write_text(text)
        world.run("systemctl", "start", name, check=False)
        said = world.journal("-u", name, "-o", "cat").splitlines()
        assert ("--done--" in said) == (name == "enough"), said
