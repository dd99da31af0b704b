"""Packages of the distribution: which are missing, which a killed apt has left half installed, who is at work."""

import asyncio
import fcntl
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fusevm.cli.failures import CliError
from fusevm.host.run import PACKAGES, program_environment, run

#: Files that must be there besides the programs of `host.run`, and their packages.
_FILES: Final = {
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"): "debian-archive-keyring",
    Path("/etc/ssl/certs/ca-certificates.crt"): "ca-certificates",
}
#: Packages for a driver that there is on x86_64 only.
_X86_ONLY: Final = frozenset({"qemu-system-x86"})
_QUERY_S: Final = 30.0
#: fcntl(2) locks: of apt and dpkg, held by either as long as it changes anything, and of apt's lists and archives.
_LOCKS: Final = tuple(
    map(Path, ("/var/lib/dpkg/lock-frontend", "/var/lib/apt/lists/lock", "/var/cache/apt/archives/lock"))
)
_DPKG_WAIT_S: Final = 300.0
_POLL_S: Final = 0.5
#: What a package may be when nobody works on it: dpkg(1), "Package states".
_SETTLED: Final = frozenset({"installed", "not-installed", "config-files"})


def missing_packages(architecture: str) -> tuple[str, ...]:
    """Debian's names of what the host daemon runs and is not there."""
    path = program_environment()["PATH"]
    missing = {package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None}
    missing |= {package for file, package in _FILES.items() if not file.exists()}
    return tuple(sorted(missing - (_X86_ONLY if architecture != "x86_64" else frozenset())))


async def find_half_installed(names: Sequence[str]) -> frozenset[str]:
    """Those of these packages whose installation was begun and not finished: their programs may be there already."""
    if not names:
        return frozenset()
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package}\n", *names]
    done = await run(query, timeout_s=_QUERY_S, check=False)  # status 1: one of them is not known at all
    states = [line.split() for line in done.text.splitlines()]
    return frozenset(name for state, name in states if state not in _SETTLED)


async def wait_for_dpkg(locks: Sequence[Path] = _LOCKS, limit_s: float = _DPKG_WAIT_S) -> None:
    """Return when no apt or dpkg is at work, such as one that outlives a killed run. Raises CliError."""
    ends_at = time.monotonic() + limit_s
    while held := [lock for lock in locks if not _is_free(lock)]:
        if time.monotonic() > ends_at:
            raise CliError(f"another apt or dpkg holds {held[0]}", hint="repeat it when that has ended")
        await asyncio.sleep(_POLL_S)


def _is_free(lock: Path) -> bool:
    try:
        with lock.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
