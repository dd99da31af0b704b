"""The installed programs of Firecracker: where they are, and what they say of themselves."""

import struct
import subprocess
from pathlib import Path
from typing import Final

import msgspec

from fusevm.host.config import HostConfig
from fusevm.host.vmm.firecracker.pins import release_folder
from fusevm.host.vmm.firecracker.release import is_as_installed, read_release
from fusevm.host.vmm.firecracker.versions import Version, parse_version

NAMES: Final = ("firecracker", "jailer")
_VERSION_S: Final = 10
#: elf(5)
_PT_INTERP: Final = 3


class ProgramFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One program."""

    path: str
    is_there: bool = False
    version: Version | None = None
    #: Without a loader, as the origin's releases are: only those have their seccomp filters built in.
    is_static: bool = False
    #: It has the digest that was noted when it was installed; None: somebody else has installed it.
    is_as_installed: bool | None = None
    #: Format of the snapshots that it writes; empty: unknown.
    snapshot_version: str = ""


def find_programs(config: HostConfig) -> dict[str, Path]:
    """Those of the settings, else those of `fuse host install`."""
    folder = release_folder(config.artefacts)
    given = {"firecracker": config.firecracker_binary, "jailer": config.jailer_binary}
    return {name: given[name] or folder / name for name in NAMES}


def observe_programs(config: HostConfig) -> dict[str, ProgramFacts]:
    """Look at both. Blocking."""
    folder = release_folder(config.artefacts)
    record = read_release(folder)
    facts = {name: observe_program(path) for name, path in find_programs(config).items()}
    return {
        name: msgspec.structs.replace(one, is_as_installed=is_as_installed(record, Path(one.path)))
        if one.is_there and Path(one.path).parent == folder
        else one
        for name, one in facts.items()
    }


def observe_program(path: Path) -> ProgramFacts:
    """Ask a program for its version. Blocking."""
    if not path.is_file():
        return ProgramFacts(path=str(path))
    format_version = _ask(path, "--snapshot-version") if path.name == "firecracker" else ""
    return ProgramFacts(
        path=str(path),
        is_there=True,
        version=parse_version(_ask(path, "--version")),
        is_static=is_static(path),
        snapshot_version=format_version.strip().lstrip("v"),
    )


def is_static(path: Path) -> bool:
    """Is this a 64-bit ELF program without an interpreter?"""
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            return False
        offset, size, count = struct.unpack_from("<Q", header, 32)[0], *struct.unpack_from("<HH", header, 54)
        file.seek(offset)
        table = file.read(size * count)
    kinds = (struct.unpack_from("<I", table, size * index)[0] for index in range(len(table) // size if size else 0))
    return _PT_INTERP not in kinds


def _ask(path: Path, option: str) -> str:
    try:
        done = subprocess.run([path, option], capture_output=True, text=True, timeout=_VERSION_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
