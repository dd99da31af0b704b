"""The `jailer` program: makes the jail as the reference does, gives up root, and becomes Firecracker.

The jail is a real one, with its own mount namespace and root directory. The one liberty: what the fake's interpreter
and QEMU are made of is mounted into it, read-only, where nobody outside sees it.
"""

import argparse
import ctypes
import os
import re
import resource
import shutil
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_DEFAULT_FILES = 2048
_FOLDERS: Final = ("/", "/dev", "/dev/net", "/run")
#: Device nodes in the jail: path, major, minor.
_NODES: Final = (("/dev/kvm", 10, 232), ("/dev/net/tun", 10, 200), ("/dev/urandom", 1, 9))
_libc = ctypes.CDLL(None, use_errno=True)


class JailFailed(Exception):
    """A step failed; the text is printed."""


def main(words: Sequence[str], visible: Sequence[Path]) -> int:
    """Run the jailer; returns only when it fails. `visible` are the directories that the fake needs inside."""
    own, rest = _split(words)
    arguments = _parse(own)
    try:
        program = _make_jail(arguments, visible)
        os.setgroups([])
        os.setgid(arguments.gid)
        os.setuid(arguments.uid)
        times = ("--start-time-us", "0", "--start-time-cpu-us", "0", "--parent-cpu-time-us", "0")
        os.execve(program, [program, "--id", arguments.id, *times, *rest], {})  # noqa: S606
    except (JailFailed, OSError) as error:
        print(f"Jailer error: {error}", file=sys.stderr)
    return 1


def _make_jail(arguments: argparse.Namespace, visible: Sequence[Path]) -> str:
    """Every step in the reference's order; the program's path inside."""
    program = Path(arguments.exec_file).resolve()
    if not _ID.fullmatch(arguments.id):
        raise JailFailed(f"Invalid instance ID: {arguments.id}")
    if not program.is_file():
        raise JailFailed(f"{program} is not a file")
    if "firecracker" not in program.name:
        raise JailFailed(
            f'Invalid filename. The filename of `--exec-file` option must contain "firecracker": {program.name}'
        )
    os.closerange(3, 1 << 16)
    os.environ.clear()
    root = Path(arguments.chroot_base_dir, program.name, arguments.id, "root")
    root.mkdir(parents=True, exist_ok=True)
    copy = root / program.name
    if copy.is_symlink() or (copy.exists() and copy.stat().st_nlink > 1):
        raise JailFailed(f"Failed to copy {program} to {copy}: it is a link")
    shutil.copy(program, copy)
    if arguments.netns:
        _join(Path(arguments.netns))
    _set_limits(arguments.resource_limit)
    _enter(root, visible)
    _make_folders(arguments.uid, arguments.gid)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(f"/{program.name}.pid", flags, 0o600), "w") as file:
        file.write(str(os.getpid()))
    return f"/{program.name}"


def _make_folders(uid: int, gid: int) -> None:
    for folder in map(Path, _FOLDERS):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o700)
        os.chown(folder, uid, gid)
    for path, major, minor in _NODES:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(major, minor))
        os.chown(path, uid, gid)
    # The fake's own needs.
    os.mknod("/dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    Path("/dev/null").chmod(0o666)
    Path("/tmp").mkdir(exist_ok=True)  # noqa: S108 - the jail's
    Path("/tmp").chmod(0o1777)  # noqa: S108


def _join(namespace: Path) -> None:
    with namespace.open() as handle:
        _check(_libc.setns(handle.fileno(), _CLONE_NEWNET), "Failed to join the network namespace")


def _enter(root: Path, visible: Sequence[Path]) -> None:
    """Make `root` the root directory, in a mount namespace of its own, and nothing else reachable."""
    _check(_libc.unshare(_CLONE_NEWNS), "Failed to unshare into a new mount namespace")
    _mount(None, Path("/"), _MS_REC | _MS_PRIVATE)
    _mount(root, root, _MS_BIND)
    os.umask(0o022)  # the way to what is mounted is open to the machine's user
    for path in visible:
        target = root / path.relative_to("/")
        if path.is_symlink():
            target.symlink_to(path.readlink())
            continue
        target.mkdir(parents=True, exist_ok=True)
        _mount(path, target, _MS_BIND)
        _mount(None, target, _MS_BIND | _MS_REMOUNT | _MS_RDONLY)
    os.chdir(root)
    _check(_libc.pivot_root(b".", b"."), "Failed to pivot root")
    _check(_libc.umount2(b".", _MNT_DETACH), "Failed to unmount the old root")
    os.chroot(".")
    os.chdir("/")


def _mount(source: Path | None, target: Path, flags: int) -> None:
    words = (os.fsencode(source) if source is not None else None, os.fsencode(target), None, flags, None)
    _check(_libc.mount(*words), f"Failed to mount {target}")


def _check(status: int, what: str) -> None:
    if status != 0:
        raise JailFailed(f"{what}: {os.strerror(ctypes.get_errno())}")


def _set_limits(wanted: Sequence[str]) -> None:
    kinds = {"fsize": resource.RLIMIT_FSIZE, "no-file": resource.RLIMIT_NOFILE}
    limits = {"no-file": _DEFAULT_FILES}
    for text in wanted:
        name, _, value = text.partition("=")
        if name not in kinds or not value.isdecimal():
            raise JailFailed(f"Invalid resource limit: {text}")
        limits[name] = int(value)
    for name, limit in limits.items():
        resource.setrlimit(kinds[name], (limit, limit))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(1, f"Jailer error: Failed to parse arguments: {message}\n")


def _split(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    if "--" not in words:
        return words, ()
    at = list(words).index("--")
    return words[:at], words[at + 1 :]


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The options that the driver may use; what the fake cannot do is an error, never ignored."""
    parser = _Parser(prog="jailer", allow_abbrev=False)
    parser.add_argument("--id", required=True)
    parser.add_argument("--exec-file", required=True)
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    parser.add_argument("--chroot-base-dir", default="/srv/jailer")
    parser.add_argument("--netns")
    parser.add_argument("--resource-limit", action="append", default=[])
    return parser.parse_args(words)
