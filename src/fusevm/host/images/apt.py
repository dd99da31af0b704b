"""The machine's own apt: finding and downloading packages without installing them, and its package mirrors.

Works without root. The machine's package lists are used when they know the package; otherwise private lists are
fetched into the working folder, so that nothing of the machine changes.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import msgspec

from fusevm.host.images.progress import Progress, ProgressEvent, watched_bytes
from fusevm.host.run import run
from fusevm.model.errors import CommandFailed

_LOOKUP_TIMEOUT_S = 60
_UPDATE_TIMEOUT_S = 300
_DOWNLOAD_TIMEOUT_S = 900
#: Settings of the machine's apt that a build with its mirrors needs as well.
_NETWORK_SETTINGS = re.compile(
    r"^Acquire::(Check-Valid-Until|Check-Date|Retries|(https?|ftp)::(Proxy|Timeout|CaInfo|Verify-Peer)\b.*) "
)


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """One archive the machine takes packages from."""

    uri: str
    #: As written in the sources: `bookworm-updates`.
    release: str
    component: str
    #: Key file, or empty for apt's trusted keys.
    signed_by: str = ""

    def line(self) -> str:
        """Render as a line of sources.list(5)."""
        options = f"[signed-by={self.signed_by}] " if self.signed_by.startswith("/") else ""
        return f"deb {options}{self.uri} {self.release} {self.component}"


class Apt:
    """apt-get and apt-cache with the machine's sources; `scratch` takes private lists when they are needed."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._options = ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "-q"]

    async def update_privately(self, progress: Progress) -> None:
        """Fetch package lists into the scratch folder and use them from here on."""
        progress(ProgressEvent(step="Reading the package lists of this machine's mirrors"))
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self._scratch / name).mkdir(parents=True, exist_ok=True)
        self._options += [
            "-o", f"Dir::State={self._scratch / 'state'}",
            "-o", "Dir::State::status=/var/lib/dpkg/status",
            "-o", f"Dir::Cache={self._scratch / 'cache'}",
            "-o", "APT::Update::Post-Invoke::=", "-o", "APT::Update::Error-Mode=any",
        ]  # fmt: skip
        await run(["apt-get", *self._options, "update"], timeout_s=_UPDATE_TIMEOUT_S)

    async def dependencies(self, package: str) -> list[str]:
        """Return the names a package depends on; empty when apt does not know the package."""
        done = await run(
            ["apt-cache", *self._options, "depends", "--no-recommends", "--no-suggests", package],
            timeout_s=_LOOKUP_TIMEOUT_S,
            check=False,
        )
        return re.findall(r"^ *\|?Depends: <?([^>\s]+)>?$", done.text, re.MULTILINE) if done.returncode == 0 else []

    async def size_bytes(self, package: str) -> int | None:
        """Return the download size of a package, or None."""
        done = await run(
            ["apt-cache", *self._options, "show", "--no-all-versions", package],
            timeout_s=_LOOKUP_TIMEOUT_S,
            check=False,
        )
        found = re.search(r"^Size: (\d+)$", done.text, re.MULTILINE)
        return int(found.group(1)) if found else None

    async def download(self, package: str, folder: Path, progress: Progress, step: str) -> Path:
        """Download one package file into an empty folder and return its path. apt checks its hash."""
        total = await self.size_bytes(package)
        async with watched_bytes(progress, step, lambda: folder_bytes(folder), total):
            await run(["apt-get", *self._options, "download", package], cwd=folder, timeout_s=_DOWNLOAD_TIMEOUT_S)
        files = await asyncio.to_thread(lambda: sorted(folder.glob("*.deb")))
        if len(files) != 1:
            raise CommandFailed(
                command=f"apt-get download {package}", exit_status=0, stderr=f"it left {len(files)} package files"
            )
        return files[0]


async def read_sources() -> list[Source]:
    """Return the archives of the machine's apt configuration, whichever format they are written in."""
    fields = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)"
    done = await run(
        ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"],
        timeout_s=_LOOKUP_TIMEOUT_S,
        check=False,
    )
    return parse_sources(done.text)


def parse_sources(text: str) -> list[Source]:
    """Parse lines of uri|release|component|key file; each archive once, in order."""
    found: dict[Source, None] = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == 4 and all(parts[:3]):
            found[Source(uri=parts[0], release=parts[1], component=parts[2], signed_by=parts[3])] = None
    return list(found)


async def read_network_settings() -> list[str]:
    """Return apt's settings about proxies, certificates and validity, as lines of apt.conf(5)."""
    done = await run(["apt-config", "dump"], timeout_s=_LOOKUP_TIMEOUT_S, check=False)
    return [line for line in done.text.splitlines() if _NETWORK_SETTINGS.match(line) and not line.endswith('"";')]


def folder_bytes(folder: Path) -> int:
    """Return the size of the files below a folder that other processes may be changing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if not path.is_dir() else 0
        except OSError:
            continue  # gone between listing and looking
    return total
