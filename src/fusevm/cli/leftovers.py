"""What an instance of Fuse has left on this machine: looked up by its data folder and the prefix of its names."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


def find_leftovers(data_root: Path, instance: str) -> list[str]:
    """Names of everything that is still there, for people; empty is what one wants."""
    return [
        *_processes(data_root),
        *(f"namespace {path.name}" for path in Path("/run/netns").glob(f"{instance}-*")),
        *(f"interface {path.name}" for path in Path("/sys/class/net").glob(f"{instance}-*")),
        *(f"group {path}" for path in Path("/sys/fs/cgroup").glob(f"**/{instance}")),
        *_mounts(data_root, instance),
        *_firewall(instance),
        *(f"folder {path}" for path in (data_root, Path("/run") / instance) if path.exists()),
    ]


def _processes(data_root: Path) -> Iterator[str]:
    sought = os.fsencode(data_root)
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if sought in command or data_root in [(link := (folder / "cwd").readlink()), *link.parents]:
                name = command.split(b"\0")[0].decode("utf-8", "replace")
                yield f"process {folder.name} ({name})"


def _mounts(data_root: Path, instance: str) -> Iterator[str]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        target = line.split()[1]
        if target.startswith((str(data_root), f"/run/{instance}/", f"/run/netns/{instance}-")):
            yield f"mount {target}"


def _firewall(instance: str) -> Iterator[str]:
    if os.geteuid() != 0 or shutil.which("nft") is None:
        return
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, timeout=30, check=False).stdout
    for line in tables.splitlines():
        if line.split()[-1:] in ([f"fuse_{instance}"], [f"fuse_{instance}_limits"]):
            yield line
