"""Read a tar archive from a stream, strictly, in bounded memory: the layers of images are somebody else's files.

ustar, pax and GNU long names (POSIX.1-2017, pax; GNU tar manual, "Basic Tar Format"). A header is 512 bytes:

    offset size what
    0      100  name                 156    1    type
    100    8    mode, octal          157    100  target of a link
    108    8    uid                  257    8    `ustar\\0` + `00` (POSIX) or `ustar  \\0` (GNU)
    116    8    gid                  329    8    major number of a device
    124    12   size                 337    8    minor number
    136    12   mtime                345    155  prefix of the name (POSIX only)
    148    8    checksum

Numbers are octal, or base 256 with the first bit set. Owns: the format. Must not: judge names, or touch files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Final

import msgspec

BLOCK: Final = 512
#: Most bytes of extended attributes and long names of one entry.
_MAX_EXTENSION: Final = 1 << 20
_CHUNK: Final = 1 << 20
_XATTR: Final = b"SCHILY.xattr."


class BadTar(Exception):
    """The stream is no tar archive, or one that cannot be read exactly; the text says why."""


class TarKind(Enum):
    """What an entry is."""

    FILE = "file"
    HARD_LINK = "hard link"
    SYMLINK = "symbolic link"
    CHARACTER = "character device"
    BLOCK = "block device"
    DIRECTORY = "directory"
    FIFO = "pipe"


_KINDS: Final = {
    b"0": TarKind.FILE,
    b"\0": TarKind.FILE,
    b"7": TarKind.FILE,
    b"1": TarKind.HARD_LINK,
    b"2": TarKind.SYMLINK,
    b"3": TarKind.CHARACTER,
    b"4": TarKind.BLOCK,
    b"5": TarKind.DIRECTORY,
    b"6": TarKind.FIFO,
}


class TarEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry, names as they stand in the archive."""

    name: bytes
    kind: TarKind
    mode: int
    uid: int
    gid: int
    #: Bytes of content that follow; 0 for all but files.
    size: int
    #: Seconds since 1970.
    mtime: int
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = {}


class TarStream:
    """Entries of an archive in order. `read(n)` returns at most n bytes, and none at the end."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._left = 0
        self._padding = 0
        self._defaults: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[TarEntry]:
        """Walk the entries; what was not read of a content is skipped. Raises BadTar."""
        extension: dict[bytes, bytes] = {}
        while True:
            self._skip_content()
            block = self._block()
            if block is None or not any(block):
                return
            kind = block[156:157]
            check_sum(block)
            size = parse_number(block[124:136], "size")
            if kind in (b"x", b"g", b"L", b"K"):
                data = self._extension(size)
                if kind == b"g":
                    self._defaults.update(parse_pax(data))
                elif kind == b"x":
                    extension.update(parse_pax(data))
                else:
                    extension[b"path" if kind == b"L" else b"linkpath"] = data.rstrip(b"\0")
                continue
            entry = make_entry(block, {**self._defaults, **extension})
            extension = {}
            self._left = entry.size
            self._padding = -entry.size % BLOCK
            yield entry

    def content(self) -> Iterator[bytes]:
        """The bytes of the entry that was just returned. Raises BadTar when they are cut off."""
        while self._left:
            chunk = self._read(min(self._left, _CHUNK))
            if not chunk:
                raise BadTar("it ends within a file")
            self._left -= len(chunk)
            yield chunk

    def _skip_content(self) -> None:
        for _chunk in self.content():
            pass
        while self._padding:
            chunk = self._read(self._padding)
            if not chunk:
                raise BadTar("it ends within a file")
            self._padding -= len(chunk)

    def _block(self) -> bytes | None:
        """The next header; None at the end of the stream, which need not be marked."""
        block = self._read_exactly(BLOCK)
        if block and len(block) < BLOCK:
            raise BadTar("it ends within a header")
        return block or None

    def _extension(self, size: int) -> bytes:
        if size > _MAX_EXTENSION:
            raise BadTar(f"a name or its attributes take {size} bytes")
        data = self._read_exactly(size + -size % BLOCK)
        if len(data) < size:
            raise BadTar("it ends within a header")
        return data[:size]

    def _read_exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = self._read(size - len(data))
            if not chunk:
                break
            data += chunk
        return bytes(data)


def check_sum(block: bytes) -> None:
    """Raise BadTar unless the header adds up; old programs added signed bytes."""
    wanted = parse_number(block[148:156], "checksum")
    blanked = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(blanked)
    if wanted not in (unsigned, unsigned - 256 * sum(byte > 127 for byte in blanked)):
        raise BadTar("a header's checksum is wrong")


def parse_number(field: bytes, what: str) -> int:
    """Parse a number of a header: octal with spaces and NULs around it, or base 256. Raises BadTar."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise BadTar(f"a {what} is negative")
        return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    text = field.partition(b"\0")[0].strip(b" ")
    if not text:
        return 0
    if any(byte not in b"01234567" for byte in text):
        raise BadTar(f"a {what} is {field!r}")
    return int(text, 8)


def parse_pax(data: bytes) -> dict[bytes, bytes]:
    """Parse records `<length> <key>=<value>\\n`, the length being that of the whole record. Raises BadTar."""
    found: dict[bytes, bytes] = {}
    while data:
        digits, space, _ = data[:20].partition(b" ")
        if not space or not digits.isdigit() or not 0 < int(digits) <= len(data):
            raise BadTar("an extended header is damaged")
        record, data = data[len(digits) + 1 : int(digits)], data[int(digits) :]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise BadTar("an extended header is damaged")
        if key.startswith(b"GNU.sparse."):
            raise BadTar("it holds sparse files in GNU's own form")
        found[key] = value[:-1]
    return found


def make_entry(block: bytes, extension: dict[bytes, bytes]) -> TarEntry:
    """Build an entry of a header and its extensions. Pure; raises BadTar."""
    name = extension.get(b"path") or _header_name(block)
    letter = block[156:157]
    kind = _KINDS.get(letter)
    if kind is None:
        raise BadTar(f"the entry {_shown(name)} is of type {letter!r}")
    if letter == b"\0" and name.endswith(b"/"):
        kind = TarKind.DIRECTORY
    size = _decimal(extension, b"size", parse_number(block[124:136], "size"))
    return TarEntry(
        name=name,
        kind=kind,
        mode=parse_number(block[100:108], "mode") & 0o7777,
        uid=_decimal(extension, b"uid", parse_number(block[108:116], "uid")),
        gid=_decimal(extension, b"gid", parse_number(block[116:124], "gid")),
        size=size if kind is TarKind.FILE else 0,
        mtime=_time(extension.get(b"mtime"), block[136:148]),
        target=extension.get(b"linkpath") or block[157:257].partition(b"\0")[0],
        device=(parse_number(block[329:337], "device"), parse_number(block[337:345], "device")),
        xattrs={key[len(_XATTR) :]: value for key, value in extension.items() if key.startswith(_XATTR)},
    )


def _header_name(block: bytes) -> bytes:
    name = block[0:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _decimal(extension: dict[bytes, bytes], key: bytes, default: int) -> int:
    text = extension.get(key)
    if text is None:
        return default
    if not text.isdigit() or len(text) > 18:
        raise BadTar(f"a {key.decode()} is {_shown(text)}")
    return int(text)


def _time(text: bytes | None, field: bytes) -> int:
    """Whole seconds; what lies before 1970 counts as 1970."""
    if text is None:
        return 0 if field[0] & 0xC0 == 0xC0 else parse_number(field, "time")
    whole = text.partition(b".")[0]
    if not whole.removeprefix(b"-").isdigit() or len(whole) > 18:
        raise BadTar(f"a time is {_shown(text)}")
    return max(0, int(whole))


def _shown(text: bytes) -> str:
    return repr(text[:200].decode(errors="replace"))
