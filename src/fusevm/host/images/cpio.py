"""Write newc cpio archives, the format of an initramfs. Pure and deterministic.

Entry (kernel, Documentation/driver-api/early-userspace/buffer-format.rst): the magic `070701`, 13 fields of 8
upper-case hex digits, the name with a NUL, padding to 4 bytes, the content, padding to 4 bytes.

| field | here |
|---|---|
| ino | 1, 2, ... in order |
| mode, uid, gid | as given, 0, 0 |
| nlink | 2 for folders, else 1 |
| mtime | 0 |
| filesize | bytes of content |
| devmajor, devminor | 0 |
| rdevmajor, rdevminor | of a device node, else 0 |
| namesize | with the NUL |
| check | 0 |
"""

from __future__ import annotations

import stat
from collections.abc import Iterable

import msgspec

_ALIGN = 4
_TRAILER = "TRAILER!!!"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of an archive. Owner is root, time 0."""

    #: Relative, without a leading slash: `dev/console`.
    path: str
    #: File type and permissions, as in stat(2).
    mode: int
    content: bytes = b""
    #: Major and minor number of a device node.
    device: tuple[int, int] = (0, 0)


def folder(path: str, permissions: int = 0o755) -> Entry:
    """Return a directory entry."""
    return Entry(path=path, mode=stat.S_IFDIR | permissions)


def file(path: str, content: bytes, permissions: int = 0o644) -> Entry:
    """Return a regular file entry."""
    return Entry(path=path, mode=stat.S_IFREG | permissions, content=content)


def character_device(path: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """Return a character device entry."""
    return Entry(path=path, mode=stat.S_IFCHR | permissions, device=(major, minor))


def write_archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive of the entries, sorted by path, so that folders come before what is in them."""
    ordered = sorted(entries, key=lambda entry: entry.path)
    paths = [entry.path for entry in ordered]
    if len(set(paths)) != len(paths):
        raise ValueError(f"a path is there twice: {paths}")
    parts = [_render(entry, number) for number, entry in enumerate(ordered, start=1)]
    parts.append(_render(Entry(path=_TRAILER, mode=0), 0))
    return b"".join(parts)


def _render(entry: Entry, number: int) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _ALIGN)
