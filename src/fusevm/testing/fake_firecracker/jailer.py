"""The `jailer` program: makes the jail as the reference does, gives up root, and becomes Firecracker.

It does not change the root directory: the fake needs its interpreter and QEMU. Everything else is done for real.
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
from typing import NoReturn

from fusevm.testing.fake_firecracker import process
from fusevm.testing.fake_firecracker.process import Setup
from fusevm.testing.fake_firecracker.rules import VERSION

_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_CLONE_NEWNET = 0x40000000
_DEFAULT_FILES = 2048
#: Device nodes in the jail: path, major, minor.
_NODES = (("dev/kvm", 10, 232), ("dev/net/tun", 10, 200), ("dev/urandom", 1, 9))


class JailFailed(Exception):
    """A step failed; the text is printed."""


def main(words: Sequence[str], setup: Setup) -> int:
    """Run the jailer; the exit status of what it becomes."""
    own, rest = _split(words)
    arguments = _parse(own)
    try:
        root = _make_jail(arguments)
        inner = process.parse([f"--id={arguments.id}", "--start-time-us=0", "--start-time-cpu-us=0", *rest])
        _give_up_root(arguments.uid, arguments.gid)
    except (JailFailed, OSError) as error:
        print(f"Jailer error: {error}", file=sys.stderr)
        return 1
    return process.serve(inner, root, setup)


def _make_jail(arguments: argparse.Namespace) -> Path:
    """Every step in the reference's order; the root directory."""
    program, base = Path(arguments.exec_file), Path(arguments.chroot_base_dir)
    machine_id: str = arguments.id
    if not _ID.fullmatch(arguments.id):
        raise JailFailed(f"Invalid instance ID: {arguments.id}")
    if not program.is_file() or program.is_symlink():
        raise JailFailed(f"{program} is not a file")
    os.closerange(3, 1 << 16)
    os.environ.clear()
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"  # for the fake's own children
    root = base / program.name / machine_id / "root"
    root.mkdir(parents=True, exist_ok=True)
    copy = root / program.name
    if copy.exists() or copy.is_symlink():
        raise JailFailed(f"Failed to copy {program} to {copy}: File exists")
    shutil.copyfile(program, copy)
    if arguments.netns:
        _join(Path(arguments.netns))
    _set_limits(arguments.resource_limit)
    for path, major, minor in _NODES:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        os.mknod(root / path, stat.S_IFCHR | 0o600, os.makedev(major, minor))
        os.chown(root / path, arguments.uid, arguments.gid)
    (root / "run").mkdir(exist_ok=True)
    for folder in (root, root / "run", copy):
        os.chown(folder, arguments.uid, arguments.gid)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(root / f"{program.name}.pid", flags, 0o600), "w") as file:
        file.write(str(os.getpid()))
    return root


def _join(namespace: Path) -> None:
    with namespace.open() as handle:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
            raise JailFailed(f"Failed to join network namespace: {os.strerror(ctypes.get_errno())}")


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


def _give_up_root(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


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
    parser.add_argument("--version", action="version", version=f"Jailer v{VERSION}")
    parser.add_argument("--id", required=True)
    parser.add_argument("--exec-file", required=True)
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    parser.add_argument("--chroot-base-dir", default="/srv/jailer")
    parser.add_argument("--netns")
    parser.add_argument("--resource-limit", action="append", default=[])
    return parser.parse_args(words)
