"""Cutting an ELF kernel out of a bzImage, on synthetic ones."""

import gzip
import lzma
import shutil
import struct
import subprocess

import pytest

from fusevm.host.images.bzimage import NotAKernel, carve_payload, check_elf, extract_elf, kernel_version

BANNER = b"\0Linux version 6.12.117+deb12-cloud-amd64 (builder@host) #1 SMP\n\0"


def make_elf(machine: int = 62, content: bytes = BANNER) -> bytes:
    """A 64-bit ELF with one loadable segment."""
    header = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 2, machine, 1, 0x1000000, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, 0x1000000, 0x1000000, len(content), len(content), 4096)
    return header + segment + content


def make_bzimage(payload: bytes, setup_sectors: int = 3, offset: int = 100) -> bytes:
    """A boot sector with a payload behind `offset` bytes of decompression code, and something after it."""
    image = bytearray((setup_sectors + 1) * 512)
    image[0x1F1] = setup_sectors
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x020F)
    struct.pack_into("<II", image, 0x248, offset, len(payload))
    return bytes(image) + b"\x90" * offset + payload + b"tail" * 10


def with_size(compressed: bytes, elf: bytes) -> bytes:
    return compressed + struct.pack("<I", len(elf))


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


def lz4(data: bytes) -> bytes:
    return subprocess.run(["lz4", "-lqc"], input=data, capture_output=True, check=True).stdout


async def test_a_gzip_kernel_comes_out_whole():
    elf = make_elf()
    assert await extract_elf(make_bzimage(gzip.compress(elf))) == elf


async def test_an_xz_kernel_comes_out_whole():
    elf = make_elf()
    assert await extract_elf(make_bzimage(with_size(lzma.compress(elf), elf), setup_sectors=31, offset=777)) == elf


@pytest.mark.parametrize("compress", [zstd, lz4])
async def test_a_kernel_that_needs_a_tool_comes_out_whole(compress):
    if shutil.which(compress.__name__) is None:
        pytest.skip(f"{compress.__name__} is not installed")
    elf = make_elf()
    assert await extract_elf(make_bzimage(with_size(compress(elf), elf))) == elf


async def test_an_elf_kernel_is_taken_as_it_is():
    assert await extract_elf(make_elf()) == make_elf()


def test_zero_setup_sectors_mean_four():
    image = bytearray(make_bzimage(b"12345678", setup_sectors=4))
    image[0x1F1] = 0
    assert carve_payload(bytes(image)) == b"12345678"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "neither an ELF file nor a bzImage"),
        (b"#!/bin/sh\n" * 100, "neither an ELF file nor a bzImage"),
        (make_bzimage(gzip.compress(make_elf()))[:2200], "payload would end at"),
        (make_bzimage(b"nonsense" * 4), "no known compression"),
        (make_bzimage(with_size(lzma.compress(make_elf())[:-20], make_elf())), "cannot be decompressed|bytes where"),
        (make_bzimage(lzma.compress(make_elf()) + struct.pack("<I", 7)), "7 are stated"),
        (make_bzimage(gzip.compress(b"not an ELF")), "no ELF file"),
        (make_elf()[:-1], "a segment ends at"),
        (make_elf()[:100], "program header table is cut off"),
        (make_elf(machine=3), "ELF machine 3"),
    ],
)
async def test_a_damaged_kernel_is_refused_with_what_is_wrong(data, problem):
    with pytest.raises(NotAKernel, match=problem):
        await extract_elf(data)


def test_the_release_is_read_from_the_banner():
    assert kernel_version(make_elf()) == "6.12.117+deb12-cloud-amd64"
    assert kernel_version(make_elf(content=b"nothing")) == "unknown"


def test_the_architecture_is_known():
    assert check_elf(make_elf()) == "amd64"
    assert check_elf(make_elf(machine=183)) == "arm64"
