"""deploy/install.sh under a real systemd and apt, killed: the next run ends as an undisturbed one does.

What it installs is a program of one line, built by the same commands as Fuse.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import systemd_world
from own_world import run_prefix
from systemd_world import ENVIRON, World

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]
SCRIPT = Path(__file__).parents[2] / "deploy" / "install.sh"
INSTALL = "/srv/tiny/deploy/install.sh"
#: A source folder as this one, of which `pip wheel` makes a `fuse` that says what it was told.
BACKEND = """
import zipfile
FILES = {
    "tiny.py": "import sys\\ndef main(): print(*sys.argv[1:])\\n",
    "tiny-1.dist-info/METADATA": "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\n",
    "tiny-1.dist-info/WHEEL": "Wheel-Version: 1.0\\nGenerator: t\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    "tiny-1.dist-info/entry_points.txt": "[console_scripts]\\nfuse = tiny:main\\n",
    "tiny-1.dist-info/RECORD": "",
}
def build_wheel(folder, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(f"{folder}/tiny-1-py3-none-any.whl", "w") as wheel:
        for name, text in FILES.items():
            wheel.writestr(name, text)
    return "tiny-1-py3-none-any.whl"
"""
SOURCES = {
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "hatch_build"\nbackend-path = ["."]\n',
    "hatch_build.py": BACKEND,
    "guest/none": "",
    "src/none": "",
    "requirements/run.txt": "# none\n",
    "requirements/build.txt": "# none\n",
}
#: No Python that makes virtual environments, and a package that brings it, half installed: what it brings is there
#: when it kills the script and dpkg. At the next try it is well.
APT_REPOSITORY = r"""
set -eu
mv /usr/lib/python3.11/ensurepip /srv/ensurepip
mkdir -p /srv/repo /srv/tree/DEBIAN
printf '#!/bin/sh\n[ -e /usr/lib/python3.11/ensurepip ] || cp -a /srv/ensurepip /usr/lib/python3.11/\n' \
  >/srv/tree/DEBIAN/preinst
cat >/srv/tree/DEBIAN/postinst <<'END'
#!/bin/sh
[ -e /srv/was-killed ] && exit 0
touch /srv/was-killed
pkill -9 -f deploy/install.sh
kill -9 "$PPID"
END
chmod 755 /srv/tree/DEBIAN/preinst /srv/tree/DEBIAN/postinst
cd /srv/repo
control='Package: python3-venv\nVersion: 99\nArchitecture: all\nMaintainer: me <me@example.com>\nDescription: probe\n'
printf "$control" >/srv/tree/DEBIAN/control
dpkg-deb -b /srv/tree venv.deb >/dev/null
size=$(stat -c %s venv.deb) sum=$(sha256sum venv.deb | cut -d' ' -f1)
printf "${control}Filename: ./venv.deb\nSize: $size\nSHA256: $sum\n" >Packages
rm -rf /etc/apt/sources.list.d /var/lib/apt/lists
mkdir -p /etc/apt/sources.list.d /var/lib/apt/lists/partial
echo 'deb [trusted=yes] file:/srv/repo ./' >/etc/apt/sources.list
"""
#: Holds a lock as apt and dpkg do, until its input ends.
HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
LOCKS = ("/var/lib/dpkg/lock-frontend", "/var/lib/apt/lists/lock")
#: For bash, which reads it first: dies before the command that matches.
KILLER = "trap 'case $BASH_COMMAND in $KILL_AT) kill -9 $$ ;; esac' DEBUG\n"
IN_PIP, BEFORE_WHOLE, AFTER_WHOLE = 'quietly "$target/bin/python"*', ": >*", 'rm -rf "$target.build"'


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with systemd_world.running(tmp_path, f"{run_prefix()}script") as world:
        world.run("rm", "-rf", "/opt/fuse")
        for name, text in {**SOURCES, "deploy/install.sh": SCRIPT.read_text()}.items():
            path = world.path("/srv/tiny") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        world.path("/srv/killer").write_text(KILLER)
        yield world


def killed(world: World, point: str) -> None:
    done = world.run("bash", INSTALL, env={"BASH_ENV": "/srv/killer", "KILL_AT": point}, check=False)
    assert done.returncode in (-9, 137), (point, done.stderr)


def programs(world: World) -> set[str]:
    return {path.name for path in world.path("/opt/fuse").iterdir()}


def test_killed_within_apt_it_is_finished_by_the_next_run(world: World):
    world.run("sh", "-c", APT_REPOSITORY)
    done = world.run("sh", INSTALL, check=False)
    assert done.returncode in (-9, 137), done.stderr
    assert world.exists("/srv/was-killed")
    assert world.exists("/usr/lib/python3.11/ensurepip")  # there is nothing to be seen of it but in dpkg's records
    assert world.run("dpkg", "--audit").stdout != ""

    assert repeat_while_locked(world) == "host install --driver qemu\n"
    state = world.run("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", "python3-venv").stdout
    assert state == "installed 99"
    assert world.run("dpkg", "--audit").stdout == ""
    assert "installing" not in world.run("sh", INSTALL).stderr


def repeat_while_locked(world: World) -> str:
    """Run it while an apt that outlived the killed run holds its locks; each is let go when it is waited for."""
    holders = [held(world, lock) for lock in LOCKS]
    words, pipe = world.words("sh", INSTALL, "install", "--driver", "qemu"), subprocess.PIPE
    script = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=ENVIRON)
    said = []
    try:
        for line in script.stderr or ():
            said.append(line)
            if "waiting for another apt" in line and holders:
                holders.pop(0).communicate()
        output, _ = script.communicate()
    finally:
        script.kill()
        for holder in holders:
            holder.communicate()
    assert (script.returncode, holders) == (0, []), said
    return output


def held(world: World, lock: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    holder = subprocess.Popen(world.words("python3", "-c", HOLDER, lock), stdin=pipe, stdout=pipe, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_killed_while_it_builds_it_leaves_one_folder_in_the_end(world: World):
    killed(world, IN_PIP)
    killed(world, BEFORE_WHOLE)
    (program,) = [name for name in programs(world) if not name.endswith(".build")]
    killed(world, AFTER_WHOLE)
    assert programs(world) == {program, f"{program}.build"}
    assert world.exists(f"/opt/fuse/{program}/whole")
    done = world.run("sh", INSTALL)
    assert (done.stdout, done.stderr) == ("host install\n", "")
    assert programs(world) == {program}

    # What is left of another version goes, too.
    world.path("/srv/tiny/src/none").write_text("newer")
    killed(world, BEFORE_WHOLE)
    assert len(programs(world)) == 3
    world.path("/srv/tiny/src/none").write_text("")
    assert world.run("sh", INSTALL, "upgrade").stdout == "host upgrade\n"
    assert programs(world) == {program}


def test_what_is_not_ours_stays(world: World):
    world.run("sh", INSTALL)
    (program,) = programs(world)
    world.path("/opt/fuse/notes").mkdir()
    world.run("rm", "-rf", f"/opt/fuse/{program}/bin")
    link = world.path("/usr/local/bin/fuse")
    link.symlink_to("/usr/bin/true")
    for _ in range(2):
        assert "removing what is left" in world.run("sh", INSTALL, "uninstall").stderr
        assert programs(world) == {"notes"}
    world.run("sh", INSTALL)
    assert programs(world) == {"notes", program}
    assert str(link.readlink()) == "/usr/bin/true"
