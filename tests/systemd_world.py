"""A machine with a real systemd and journal, without a second kernel: this machine's root file system under a writable
layer, in namespaces of its own (mounts, processes, network, control groups). Everything in it ends with it.

`fuse` is in it as `deploy/install.sh` would put it there, once per name in PROGRAMS, running the sources under test.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "src"
PROGRAMS = ("old", "new")
SHARED = Path("/srv/fuse-test/shared")
ENVIRON = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/"}
_READY_S = 120.0
_PREPARE = r"""
set -eu
world=$1 sources=$2 packages=$3
mount -t tmpfs -o mode=755 fuse-test "$world"
mkdir "$world/upper" "$world/work" "$world/root"
mount -t overlay fuse-test -o "lowerdir=/,upperdir=$world/upper,workdir=$world/work" "$world/root"
root=$world/root
show() { mkdir -p "$root/srv/fuse-test/$1"; mount --bind -o ro "$2" "$root/srv/fuse-test/$1"; }
show src "$sources"
show packages "$packages"
[ -z "$4" ] || show shared "$4"
mount -t tmpfs -o mode=755 fuse-test "$root/dev"
for node in null zero full random urandom tty net/tun; do
  [ -e "/dev/$node" ] || continue
  mkdir -p "$(dirname "$root/dev/$node")"; touch "$root/dev/$node"; mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"; ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 fuse-test "$root/sys/fs/cgroup"
for folder in run tmp var/log var/lib/systemd; do mount -t tmpfs -o mode=755 fuse-test "$root/$folder"; done
chmod 1777 "$root/tmp"; mkdir -p "$root/var/log/journal"
# Nothing of the machine's own services, nor of an own installation of Fuse.
rm -rf "$root"/etc/systemd/system/*.wants "$root"/etc/systemd/system/*.service "$root"/etc/fuse "$root"/opt/fuse
rm -rf "$root"/var/lib/fuse "$root"/usr/local/bin/fuse
ln -sf /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
ln -sf /dev/null "$root/etc/systemd/system/systemd-networkd.service"
ip link set lo up
cd "$root"
mkdir -p .before
pivot_root . .before
umount -l /.before
rmdir /.before 2>/dev/null || true
# As on a real machine, where systemd does it: what it mounts for a service must be seen there.
mount --make-rshared /
exec env -i container=fuse-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
  /lib/systemd/systemd --system --log-target=journal --show-status=no
"""


class World:
    """The running machine. Paths are those within it."""

    def __init__(self, init: int) -> None:
        self.init = init

    def words(self, *command: str) -> list[str]:
        """A command of this machine that runs a program in it."""
        return ["nsenter", "-t", str(self.init), "-m", "-p", "-u", "-i", "-n", "-C", "-r", "-w", "--", *command]

    def run(
        self, *command: str, check: bool = True, timeout: float = 240, env: dict[str, str] | None = None, **more: object
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program in it."""
        environ = {**ENVIRON, **(env or {})}
        done = subprocess.run(
            self.words(*command), text=True, capture_output=True, timeout=timeout, env=environ, check=False, **more
        )  # type: ignore[call-overload]
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: status {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.journal()}")
        return done

    def fuse(self, *words: str, program: str = "old", **options: object) -> "subprocess.CompletedProcess[str]":
        """Run one of its `fuse` programs."""
        return self.run(f"/opt/fuse/{program}/bin/fuse", *words, **options)  # type: ignore[arg-type]

    def path(self, inside: str | Path) -> Path:
        """One of its files, as seen from here."""
        return Path(f"/proc/{self.init}/root{inside}")

    def read(self, inside: str | Path) -> str:
        return self.path(inside).read_text()

    def exists(self, inside: str | Path) -> bool:
        return os.path.lexists(self.path(inside))

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", f"--property={name}", "--value", unit).stdout.strip()

    def journal(self, *words: str) -> str:
        """What its journal has, newest last."""
        self.run("journalctl", "--sync", check=False)
        return self.run("journalctl", "--no-pager", "-q", *(words or ("-n", "40")), check=False).stdout


@contextlib.contextmanager
def running(folder: Path, name: str, shared: Path | None = None) -> Iterator[World]:
    """Boot one below an empty `folder`; `name` names its control group. SHARED in it shows the folder `shared`."""
    place = folder / "world"
    place.mkdir()
    group = _cgroup_mount() / name
    group.mkdir()
    unshare = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--cgroup"]
    unshare += ["--uts", "--ipc", "--net", "sh", "-c", _PREPARE, "prepare", str(place), str(SOURCES)]
    unshare += [sysconfig.get_path("purelib"), str(shared or "")]
    join = 'echo $$ >"$0/cgroup.procs"; exec "$@"'
    log = (folder / "world.log").open("w+")
    outer = subprocess.Popen(["sh", "-c", join, str(group), *unshare], stdout=log, stderr=log)
    try:
        world = World(_wait_for_init(outer, log))
        for program in PROGRAMS:
            make_program(world, program)
        yield world
    finally:
        outer.kill()
        outer.wait()
        log.close()
        _remove_group(group)


def make_program(world: World, name: str) -> None:
    """An installed `fuse`: an interpreter of its own with the sources under test."""
    base = Path(f"/opt/fuse/{name}")
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = world.path(base / "lib" / version / "site-packages")
    packages.mkdir(parents=True)
    (packages / "fuse.pth").write_text("/srv/fuse-test/src\n/srv/fuse-test/packages\n")
    world.path(base / "bin").mkdir()
    world.path(base / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    home = Path(os.path.realpath(sys.executable)).parent
    world.path(base / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    script = world.path(base / "bin" / "fuse")
    script.write_text(f"#!{base}/bin/python -B\nfrom fusevm.cli.main import main\nmain()\n")
    script.chmod(0o755)


def _wait_for_init(outer: "subprocess.Popen[bytes]", log: object) -> int:
    ends_at = time.monotonic() + _READY_S
    state = ""
    while time.monotonic() < ends_at and outer.poll() is None:
        for child in _children(outer.pid):
            state = _ask_state(child)
            if state in ("running", "degraded"):
                return child
        time.sleep(0.2)
    log.seek(0)  # type: ignore[attr-defined]
    raise AssertionError(f"systemd did not come up ({state or 'no answer'}): {log.read()}")  # type: ignore[attr-defined]


def _ask_state(init: int) -> str:
    if not Path(f"/proc/{init}/root/run/systemd/private").exists():
        return ""
    return World(init).run("systemctl", "is-system-running", check=False).stdout.strip()


def _children(pid: int) -> Sequence[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _cgroup_mount() -> Path:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return Path(line.split()[1])
    raise AssertionError("no cgroup2 is mounted on this machine")


def _remove_group(group: Path) -> None:
    ends_at = time.monotonic() + 30
    while group.exists() and time.monotonic() < ends_at:
        for procs in group.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                for pid in procs.read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
        for folder in sorted(group.rglob("*/"), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            group.rmdir()
        time.sleep(0.1)
    shutil.rmtree(group, ignore_errors=True)
