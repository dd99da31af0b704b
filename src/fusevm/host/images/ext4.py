"""Make the read-only ext4 file of an image from a folder or a tar, with or without root.

The same tree gives the same bytes: fixed UUID, hash seed and times, no journal (nothing is ever written). Without
root, files are unpacked in a user namespace that maps only the caller; the few files with other owners get them back
by debugfs(8).
"""

from __future__ import annotations

import asyncio
import os
import re
import tarfile
from pathlib import Path

import msgspec

from fusevm.host.images.progress import Progress, ProgressEvent
from fusevm.host.images.workspace import ensure_free
from fusevm.host.run import run
from fusevm.model.errors import BadField, CommandFailed

#: Every time stamp that is not the content's own: 2023-11-14T22:13:20Z.
EPOCH_S = 1_700_000_000
_UUID = "f05e0000-0000-4000-8000-000000000001"
_BLOCK_BYTES = 4096
_INODE_BYTES = 256
_FIRST_INODE = 11
_ROOT_INODE = 2
_MAKE_TIMEOUT_S = 1800
_GROWTH_ATTEMPTS = 4
#: What debugfs says of itself: `debugfs 1.47.0 (5-Feb-2023)`.
_BANNER = re.compile(r"debugfs \d")


class Extent(msgspec.Struct, frozen=True, kw_only=True):
    """How much a tree holds."""

    #: Inodes needed: files (hard links once), folders, links.
    inodes: int
    #: Whole blocks of all files, and one per folder.
    bytes: int


async def unpack_tar(tar: Path, tree: Path, progress: Progress) -> None:
    """Unpack a root file system into a new folder: owners (as root), modes, hard links, extended attributes.

    Device nodes below /dev are left out; the guest mounts its own.
    """
    total = (await asyncio.to_thread(tar.stat)).st_size
    progress(ProgressEvent(step="Unpacking the root file system", total_bytes=total))
    await asyncio.to_thread(ensure_free, tree.parent, 2 * total)
    await asyncio.to_thread(tree.mkdir)
    options = ["--extract", "--preserve-permissions", "--numeric-owner", "--delay-directory-restore"]
    # Anchored: only the /dev of the root, not every folder of that name.
    options += [f"--file={tar}", f"--directory={tree}", "--anchored", "--exclude=./dev/*", "--exclude=dev/*"]
    if os.geteuid() == 0:
        words = ["tar", *options, "--same-owner", "--xattrs", "--xattrs-include=*"]
    else:
        words = [*_in_user_namespace(), "tar", *options, "--no-same-owner"]
    await run(words, timeout_s=_MAKE_TIMEOUT_S)


async def make_ext4(tree: Path, target: Path, progress: Progress, owners: dict[str, tuple[int, int]]) -> int:
    """Write the ext4 file of a tree, just large enough, and return its size.

    `owners` are (uid, gid) by path for files that the tree could not be given to (`tar_owners`). Files of the caller
    become root's when the caller is not root.
    """
    progress(ProgressEvent(step="Measuring the root file system"))
    extent = await asyncio.to_thread(measure, tree)
    size = estimate_bytes(extent)
    await asyncio.to_thread(ensure_free, target.parent, size)
    for attempt in range(_GROWTH_ATTEMPTS):
        progress(ProgressEvent(step="Writing the ext4 image", total_bytes=size))
        try:
            await _mke2fs(tree, target, size, extent.inodes)
            break
        except CommandFailed as e:
            await asyncio.to_thread(target.unlink, missing_ok=True)
            if attempt == _GROWTH_ATTEMPTS - 1 or not is_too_small(e.stderr):
                raise
            size = _whole_blocks(size * 5 // 4)
    await _settle(target, extent.inodes, owners)
    # mke2fs leaves out a last block group that would be too small.
    size = (await asyncio.to_thread(target.stat)).st_size
    progress(ProgressEvent(step="Writing the ext4 image", done_bytes=size, total_bytes=size))
    return size


def measure(tree: Path) -> Extent:
    """Measure a tree without following links."""
    seen: set[tuple[int, int]] = set()
    total = _BLOCK_BYTES
    for folder, subfolders, files in os.walk(tree):
        for name in (*subfolders, *files):
            stats = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - ten thousand Path objects cost a second
            key = (stats.st_dev, stats.st_ino)
            if key not in seen:
                seen.add(key)
                total += _whole_blocks(stats.st_size)
    return Extent(inodes=len(seen) + 1, bytes=total)


def estimate_bytes(extent: Extent) -> int:
    """Estimate the size of a file system: content, inode table, 1 % for maps and extents, 2 MiB."""
    inode_table = (extent.inodes + _FIRST_INODE + 64) * _INODE_BYTES
    return _whole_blocks(extent.bytes + inode_table + extent.bytes // 100 + (2 << 20))


def tar_owners(tar: Path) -> dict[str, tuple[int, int]]:
    """Return the owner of each entry of a tar that does not belong to root, by absolute path; without those of /dev."""
    owners = {}
    with tarfile.open(tar) as archive:
        for entry in archive:
            path = "/" + entry.name.removeprefix("./").strip("/")
            if (entry.uid, entry.gid) != (0, 0) and not path.startswith("/dev/"):
                owners[path] = (entry.uid, entry.gid)
    return owners


def render_owners(owners: dict[str, tuple[int, int]]) -> list[str]:
    """Render what gives files to their owners, for debugfs(8). Raises BadField for a name that it cannot be told."""
    lines = []
    for path, (uid, gid) in owners.items():
        if "\n" in path or "\r" in path:
            # Each line is a command, and some of them write files of the host.
            raise BadField(field="tar", problem=f"the file {path!r} has a line break in its name; build it as root")
        quoted = '"' + path.replace('"', '""') + '"'
        lines += [f"sif {quoted} uid {uid}", f"sif {quoted} gid {gid}"]
    return lines


async def run_debugfs(target: Path, lines: list[str]) -> None:
    """Change an ext4 file. Raises CommandFailed for the first line that fails: debugfs itself still exits with 0."""
    script = "\n".join(lines).encode() + b"\n"
    env = {"E2FSPROGS_FAKE_TIME": str(EPOCH_S)}
    done = await run(["debugfs", "-w", "-f", "-", target], stdin=script, timeout_s=_MAKE_TIMEOUT_S, env=env)
    said = [line for line in done.stderr.decode(errors="replace").splitlines() if not _BANNER.match(line)]
    if said:
        raise CommandFailed(command=f"debugfs -w -f - {target}", exit_status=0, stderr=said[0])


def blank_words(target: str, size: int, inodes: int) -> list[str]:
    """The words that make the file system itself, empty unless more is said before the target's name."""
    features = "^has_journal,^resize_inode"
    extended = f"hash_seed={_UUID},root_owner=0:0,nodiscard,lazy_itable_init=0"
    words = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(_BLOCK_BYTES), "-m", "0", "-I", str(_INODE_BYTES)]
    words += ["-O", features, "-N", str(inodes + _FIRST_INODE + 16), "-U", _UUID, "-E", extended, "-L", "fuse-image"]
    return [*words, target, f"{size // 1024}k"]


def is_too_small(problem: str) -> bool:
    """Is this what the tools say of a file system that is too small?"""
    return "Could not allocate" in problem


async def _mke2fs(tree: Path, target: Path, size: int, inodes: int) -> None:
    *options, file, blocks = blank_words(str(target), size, inodes)
    words = [*options, "-d", str(tree), file, blocks]
    if os.geteuid() != 0:
        words = [*_in_user_namespace(), *words]
    await run(words, timeout_s=_MAKE_TIMEOUT_S, env={"E2FSPROGS_FAKE_TIME": str(EPOCH_S)})


async def _settle(target: Path, inodes: int, owners: dict[str, tuple[int, int]]) -> None:
    """Set what mke2fs took from the building: change and access times, the write counter, owners it could not know."""
    lines = ["ssv kbytes_written 0"]
    lines += [
        f"sif <{number}> {field} @{EPOCH_S}"
        for number in (_ROOT_INODE, *range(_FIRST_INODE, _FIRST_INODE + inodes))
        for field in ("ctime", "atime", "crtime")
    ]
    if os.geteuid() != 0:
        lines += render_owners(owners)
    await run_debugfs(target, lines)


def _in_user_namespace() -> list[str]:
    return ["unshare", "--map-root-user", "--"]


def _whole_blocks(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
