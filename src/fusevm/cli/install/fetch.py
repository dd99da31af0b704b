"""Files of others, by digest: from a local folder, or downloaded. What has another digest is never kept.

A download that is cut off goes on where it stopped; one that stalls, never ends or sends too much is given up. Proxies
and certificates are those of this machine.
"""

import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path
from typing import Final

import msgspec

from fusevm.host.images.workspace import sync_folder
from fusevm.model.errors import DigestMismatch, FetchFailed

#: (bytes so far, bytes in all or None).
Progress = Callable[[int, int | None], None]
_CHUNK_BYTES: Final = 1 << 18


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """When a download is given up."""

    #: Without a byte.
    stall_s: float = 30.0
    total_s: float = 1800.0
    #: The largest pinned file has about 50 MB.
    max_bytes: int = 512 << 20
    attempts: int = 4


def sha256_of(path: Path) -> str:
    """The digest of a file, 64 hex digits."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def is_whole(path: Path, sha256: str) -> bool:
    """Is exactly that file there?"""
    return path.is_file() and sha256_of(path) == sha256


def take_local(source: Path, sha256: str, target: Path) -> None:
    """Copy a file that was brought here. Raises DigestMismatch; `target` is whole or not there."""
    part = _part_of(target)
    shutil.copyfile(source, part)
    _publish(part, sha256, target, str(source))


def download(
    url: str, sha256: str, target: Path, progress: Progress = lambda _done, _total: None, limits: Limits | None = None
) -> None:
    """Fetch a file. Raises DigestMismatch or FetchFailed; `target` is whole or not there.

    What came of a cut-off transfer stays in `<target>.part` for the next try, also that of another process.
    """
    chosen = limits or Limits()
    part = _part_of(target)
    ends_at = time.monotonic() + chosen.total_s
    problem = ""
    for _ in range(chosen.attempts):
        try:
            _continue(url, part, progress, chosen, ends_at)
        except _GivenUp as error:
            part.unlink(missing_ok=True)
            raise FetchFailed(what=url, problem=str(error)) from error
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}"
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            elif error.code < http.client.INTERNAL_SERVER_ERROR:
                break
        except (OSError, http.client.HTTPException) as error:
            problem = _describe(error)
        else:
            _publish(part, sha256, target, url)
            return
    raise FetchFailed(what=url, problem=problem)


class _GivenUp(Exception):
    """Trying again would not help."""


def _continue(url: str, part: Path, progress: Progress, limits: Limits, ends_at: float) -> None:
    """Fetch what is missing of a file; raises when it is still not all of it."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "fuse", "Accept-Encoding": "identity"})  # noqa: S310 - http(s), checked
    if have:
        request.add_header("Range", f"bytes={have}-")
    context = ssl.create_default_context()
    with urllib.request.urlopen(request, timeout=limits.stall_s, context=context) as answer:  # noqa: S310 - as above
        is_rest = answer.status == http.client.PARTIAL_CONTENT
        done = have if is_rest else 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length and length.isdecimal() else None
        if total is not None and total > limits.max_bytes:
            raise _GivenUp(f"it has {total} bytes, more than the {limits.max_bytes} that it may have")
        with part.open("ab" if is_rest else "wb") as file:
            while chunk := answer.read1(_CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
                if done > limits.max_bytes:
                    raise _GivenUp(f"it has more than the {limits.max_bytes} bytes that it may have")
                if time.monotonic() > ends_at:
                    raise _GivenUp(f"it did not end within {limits.total_s:.0f} s")
        if total is not None and done < total:
            raise http.client.IncompleteRead(b"", total - done)


def _publish(part: Path, sha256: str, target: Path, origin: str) -> None:
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise DigestMismatch(what=origin, wanted=sha256, found=found)
    fd = os.open(part, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    part.replace(target)
    sync_folder(target.parent)


def _part_of(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f"{target.name}.part")


def _describe(error: OSError | http.client.HTTPException) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return "the transfer was cut off"
    reason = getattr(error, "reason", error)
    return "nothing came for too long" if isinstance(reason, TimeoutError) else str(reason) or type(error).__name__
