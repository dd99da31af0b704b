"""What `fuse host install` notes beside the programs of a release: which archive they are from, and their digests."""

import hashlib
from pathlib import Path
from typing import Final

import msgspec

RECORD: Final = "release.json"


class ReleaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`release.json`: what was installed."""

    #: 64 hex digits, as all digests here.
    archive_sha256: str
    #: File name -> digest.
    files: dict[str, str]


def read_release(folder: Path) -> ReleaseRecord | None:
    """The record of a release's folder; None without one that can be read. Blocking."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=ReleaseRecord)
    except (OSError, msgspec.DecodeError):
        return None


def is_as_installed(record: ReleaseRecord | None, program: Path) -> bool:
    """Has a program the digest that was noted for it? Blocking."""
    try:
        with program.open("rb") as file:
            return record is not None and hashlib.file_digest(file, "sha256").hexdigest() == record.files[program.name]
    except (OSError, KeyError):
        return False


def is_release_whole(folder: Path, archive_sha256: str) -> bool:
    """Are the programs of exactly this archive there, unchanged? Blocking."""
    record = read_release(folder)
    if record is None or record.archive_sha256 != archive_sha256:
        return False
    return all(is_as_installed(record, folder / name) for name in record.files)
