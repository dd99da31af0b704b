"""Cut the ELF kernel out of a bzImage, and check ELF kernels. Pure but for the zstd and lz4 tools.

An ELF kernel starts without decompression in the guest (PVH entry), which saves over a second per emulated boot.

Layout used (Linux, Documentation/arch/x86/boot.rst; all little-endian):

| offset | size | field |
|---|---|---|
| 0x1f1 | 1 | setup_sects: sectors of real-mode code after the first; 0 means 4 |
| 0x202 | 4 | "HdrS" |
| 0x206 | 2 | protocol version; payload fields exist since 0x0208 |
| 0x248 | 4 | payload_offset, from the start of the protected-mode code |
| 0x24c | 4 | payload_length; all formats but gzip end in 4 bytes of uncompressed size |
"""

from __future__ import annotations

import asyncio
import bz2
import lzma
import re
import struct
import zlib

from fusevm.host.run import run
from fusevm.model.errors import CommandFailed

_SECTOR = 512
_PT_LOAD = 1
_ELF64 = 2
#: e_machine of the kernels we can start.
MACHINES = {62: "amd64", 183: "arm64"}
_DECOMPRESS_TIMEOUT_S = 60


class NotAKernel(ValueError):
    """The bytes are no usable kernel; the text says why. Who knows the path translates it to KernelCorrupt."""


async def extract_elf(data: bytes) -> bytes:
    """Return the ELF kernel in `data`, which is a bzImage or already an ELF. Raise NotAKernel otherwise."""
    if data[:4] == b"\x7fELF":
        elf = data
    else:
        elf = await decompress(carve_payload(data))
    check_elf(elf)
    return elf


def carve_payload(image: bytes) -> bytes:
    """Return the compressed kernel inside a bzImage, with its trailing size if it has one."""
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise NotAKernel("it is neither an ELF file nor a bzImage")
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < 0x0208:
        raise NotAKernel(f"its boot protocol {version >> 8}.{version & 255:02} is older than 2.08")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * _SECTOR + offset
    if length < 8 or start + length > len(image):
        raise NotAKernel(f"it ends at byte {len(image)}, its payload would end at {start + length}")
    return image[start : start + length]


async def decompress(payload: bytes) -> bytes:
    """Decompress a bzImage payload by its magic number, and check the size it states."""
    stated = int.from_bytes(payload[-4:], "little")
    body = payload if payload[:2] == b"\x1f\x8b" else payload[:-4]
    try:
        elf = await _decompress_body(body)
    except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError, CommandFailed) as e:
        if isinstance(e, NotAKernel):
            raise
        raise NotAKernel(f"its payload cannot be decompressed: {e}") from e
    if len(elf) != stated:
        raise NotAKernel(f"its payload has {len(elf)} bytes where {stated} are stated")
    return elf


async def decompress_file(data: bytes, suffix: str) -> bytes:
    """Decompress a module file by its last suffix (.xz, .zst, .gz); others are returned as they are."""
    if suffix not in {".xz", ".zst", ".gz"}:
        return data
    return await _decompress_body(data)


async def _decompress_body(body: bytes) -> bytes:
    if body.startswith(b"\x28\xb5\x2f\xfd"):
        return (
            await run(["zstd", "-dcq"], stdin=body, timeout_s=_DECOMPRESS_TIMEOUT_S, max_output_bytes=1 << 30)
        ).stdout
    if body.startswith((b"\x02\x21\x4c\x18", b"\x04\x22\x4d\x18")):
        return (
            await run(["lz4", "-dcq"], stdin=body, timeout_s=_DECOMPRESS_TIMEOUT_S, max_output_bytes=1 << 30)
        ).stdout
    if body.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
        return await asyncio.to_thread(lzma.decompress, body)
    if body.startswith(b"\x1f\x8b"):
        return await asyncio.to_thread(lambda: zlib.decompressobj(wbits=31).decompress(body))
    if body.startswith(b"BZh"):
        return await asyncio.to_thread(bz2.decompress, body)
    raise NotAKernel(f"its payload starts with {body[:4].hex()}, which is no known compression")


def check_elf(elf: bytes) -> str:
    """Check that an ELF kernel is whole and for a machine we know; return its architecture."""
    if elf[:4] != b"\x7fELF" or len(elf) < 64:
        raise NotAKernel("its payload is no ELF file")
    if elf[4] != _ELF64 or elf[5] != 1:
        raise NotAKernel("it is no 64-bit little-endian ELF file")
    (machine,) = struct.unpack_from("<H", elf, 18)
    if machine not in MACHINES:
        raise NotAKernel(f"it is for ELF machine {machine}; x86-64 is 62, arm64 is 183")
    (table,) = struct.unpack_from("<Q", elf, 32)
    entry_size, entries = struct.unpack_from("<HH", elf, 54)
    if not entries or entry_size < 56 or table + entries * entry_size > len(elf):
        raise NotAKernel("its program header table is cut off")
    loads = 0
    for index in range(entries):
        kind, _flags, offset, _vaddr, _paddr, size = struct.unpack_from("<IIQQQQ", elf, table + index * entry_size)
        if kind == _PT_LOAD:
            loads += 1
            if offset + size > len(elf):
                raise NotAKernel(f"it has {len(elf)} bytes, a segment ends at {offset + size}")
    if not loads:
        raise NotAKernel("it has nothing to load")
    return MACHINES[machine]


def kernel_version(elf: bytes) -> str:
    """Return the release the kernel names in its banner, or "unknown"."""
    found = re.search(rb"Linux version (\d[^\s\x00]{0,100}) ", elf)
    return found.group(1).decode("ascii", "replace") if found else "unknown"
