"""Download a file from a URL that somebody else chose: bounded in size and time, and only from where it may come.

Each connection, of each redirect, goes to the very address that was checked (`addresses`). Names are resolved once per
connection; proxies are not used, since a proxy would resolve anew. The file is written sparsely: blocks of zeros
become holes. Its sha256 is that of the bytes as they came.

Owns: the download. Must not: know what the file is, or where it is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urljoin, urlsplit

import msgspec

from fusevm.host.images.addresses import Address, Network, is_own, refusal
from fusevm.host.images.workspace import ensure_free
from fusevm.model.errors import AddressRefused, ArtifactRefused, DigestMismatch, FetchFailed, ImageTooLarge
from fusevm.wire.http1 import Connection, Response
from fusevm.wire.streams import SocketStream

_MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MAX_URL: Final = 8192
#: Runs of zeros of this size become holes: the block of ext4.
_HOLE_BYTES: Final = 4096
_ZEROS: Final = bytes(_HOLE_BYTES)
#: How often the free space is looked at.
_SPACE_CHECK_BYTES: Final = 64 << 20
_PORTS: Final = {"http": 80, "https": 443}


class FetchPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What a download may do."""

    #: Networks that are allowed although they are not public.
    allowed: tuple[Network, ...] = ()
    max_bytes: int = 16 << 30
    #: The whole download, and the longest silence in it.
    timeout_s: float = 1800.0
    silence_s: float = 60.0
    #: What must stay free on the file system.
    reserve_bytes: int = 0


class Validators(msgspec.Struct, frozen=True, kw_only=True):
    """What a server gave to ask later whether the file has changed (RFC 9110, section 8.8)."""

    etag: str = ""
    last_modified: str = ""

    def headers(self) -> dict[str, str]:
        """The conditional headers of a request."""
        named = {"if-none-match": self.etag, "if-modified-since": self.last_modified}
        return {name: value for name, value in named.items() if value}


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was downloaded whole."""

    #: Of the bytes as they came; 64 hex digits.
    sha256: str
    size_bytes: int
    validators: Validators


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A URL in its parts."""

    url: str
    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def shown(url: str) -> str:
    """A URL without what may be secret in it: user, password, query. For records, messages and logs."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"[:300]


async def fetch(
    url: str,
    target: Path,
    policy: FetchPolicy,
    *,
    sha256: str = "",
    known: Validators | None = None,
    on_bytes: Callable[[int, int | None], None] = lambda _done, _total: None,
) -> Fetched | None:
    """Download a URL into a new file `target`; None when the server says that `known` is still current.

    Raises AddressRefused, ArtifactRefused (no such file, or not as it must be), ImageTooLarge, DigestMismatch,
    FetchFailed (try again), NoSpace. On failure there is no `target`.
    """
    try:
        async with asyncio.timeout(policy.timeout_s):
            async with _follow(url, policy, known) as response:
                if response is None:
                    return None
                fetched = await _save(response, url, target, policy, on_bytes)
    except TimeoutError as e:
        await asyncio.to_thread(target.unlink, missing_ok=True)
        raise FetchFailed(what=shown(url), problem=f"it took longer than {policy.timeout_s:.0f} s") from e
    except BaseException:
        await asyncio.to_thread(target.unlink, missing_ok=True)
        raise
    if sha256 and fetched.sha256 != sha256:
        await asyncio.to_thread(target.unlink, missing_ok=True)
        raise DigestMismatch(what=shown(url), found=fetched.sha256, wanted=sha256)
    return fetched


@asynccontextmanager
async def _follow(url: str, policy: FetchPolicy, known: Validators | None) -> AsyncIterator[Response | None]:
    """The answer at the end of the redirects, each of them checked; None for "not modified"."""
    place = parse_url(url)
    for _ in range(_MAX_REDIRECTS + 1):
        async with _ask(place, policy, known) as response:
            if response.status not in _REDIRECTS:
                if response.status == 304 and known is not None:
                    yield None
                else:
                    check_answer(place.url, response.status, response.headers, policy.max_bytes)
                    yield response
                return
            place = _next_place(place, response.headers.get("location", ""))
    raise ArtifactRefused(url=shown(url), problem=f"it redirects more than {_MAX_REDIRECTS} times")


@asynccontextmanager
async def _ask(place: Place, policy: FetchPolicy, known: Validators | None) -> AsyncIterator[Response]:
    """Send the request to an address that may be asked; the answer's head."""
    async with _patience(place.url, policy):
        stream = await connect(place, policy)
    connection = Connection(stream, place.authority)
    headers = {"accept-encoding": "identity", "user-agent": "fuse", **(known.headers() if known else {})}
    try:
        async with _patience(place.url, policy):
            response = await connection.request("GET", place.target, headers=headers)
        yield response
    except ConnectionError as e:
        raise FetchFailed(what=shown(place.url), problem=str(e) or type(e).__name__) from e
    finally:
        await connection.close()


@asynccontextmanager
async def _patience(url: str, policy: FetchPolicy) -> AsyncIterator[None]:
    """Raise FetchFailed when the block takes longer than a silence may."""
    try:
        async with asyncio.timeout(policy.silence_s):
            yield
    except TimeoutError as e:
        raise FetchFailed(what=shown(url), problem=f"nothing came for {policy.silence_s:.0f} s") from e


async def connect(place: Place, policy: FetchPolicy) -> SocketStream:
    """Connect to the first address of the host that may be connected to and answers."""
    addresses = await _resolve(place)
    good = await asyncio.to_thread(_permitted, place, addresses, policy)
    tls = ssl.create_default_context() if place.scheme == "https" else None
    problem = ""
    for address in good:
        try:
            pair = await asyncio.open_connection(
                str(address), place.port, ssl=tls, server_hostname=place.host if tls else None
            )
        except OSError as e:  # ssl.SSLError among them
            problem = str(e)
            continue
        return SocketStream(*pair)
    raise FetchFailed(what=shown(place.url), problem=problem)


async def _resolve(place: Place) -> list[Address]:
    with contextlib.suppress(ValueError):
        return [ipaddress.ip_address(place.host.partition("%")[0])]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise FetchFailed(what=shown(place.url), problem=f"{place.host} has no address ({e})") from e
    texts = dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found)
    return [ipaddress.ip_address(text) for text in texts]


def _permitted(place: Place, addresses: list[Address], policy: FetchPolicy) -> list[Address]:
    """Those of a host's addresses that may be connected to. Raises AddressRefused when there is none."""
    kinds = {address: refusal(address, policy.allowed) for address in addresses}
    for address, kind in kinds.items():
        is_allowed = any(address in network for network in policy.allowed if network.version == address.version)
        if not kind and not is_allowed and is_own(address):
            kinds[address] = "this host itself"
    good = [address for address, kind in kinds.items() if not kind]
    if not good:
        address, kind = next(iter(kinds.items()))
        raise AddressRefused(url=shown(place.url), address=str(address), kind=kind)
    return good


def parse_url(url: str) -> Place:
    """Take a URL apart. Raises ArtifactRefused for one that is not http or https, or not written as it must be."""
    problem = ""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise ArtifactRefused(url=url[:80], problem=str(e)) from e
    if len(url) > _MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        problem = f"a URL has at most {_MAX_URL} printable ASCII characters"
    elif parts.scheme not in _PORTS:
        problem = "only http and https are fetched"
    elif not parts.hostname:
        problem = "it names no host"
    elif parts.username is not None:
        problem = "user and password in a URL are not taken"
    if problem:
        raise ArtifactRefused(url=shown(url), problem=problem)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host, scheme = parts.hostname or "", parts.scheme
    return Place(url=url, scheme=scheme, host=host, port=port or _PORTS[scheme], target=target)


def _next_place(place: Place, location: str) -> Place:
    if not location:
        raise ArtifactRefused(url=shown(place.url), problem="it redirects to nowhere")
    following = parse_url(urljoin(place.url, location))
    if place.scheme == "https" and following.scheme == "http":
        raise ArtifactRefused(url=shown(place.url), problem=f"it redirects from https to {shown(following.url)}")
    return following


def check_answer(url: str, status: int, headers: Mapping[str, str], max_bytes: int) -> None:
    """Raise unless the answer is the whole file, as it is, and not too long. Pure."""
    if status >= 500 or status in (408, 429):
        raise FetchFailed(what=shown(url), problem=f"the server answers with status {status}")
    if status != 200:
        raise ArtifactRefused(url=shown(url), problem=f"the server answers with status {status}")
    coding = headers.get("content-encoding", "identity")
    if coding not in ("", "identity"):
        raise ArtifactRefused(url=shown(url), problem=f"the server sends it {coding}-encoded")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise ImageTooLarge(image=shown(url), problem=f"{length} bytes of at most {max_bytes}")


async def _save(
    response: Response, url: str, target: Path, policy: FetchPolicy, on_bytes: Callable[[int, int | None], None]
) -> Fetched:
    length = response.headers.get("content-length", "")
    total = int(length) if length.isdecimal() else None
    if total is not None:
        await asyncio.to_thread(ensure_free, target.parent, total + policy.reserve_bytes)
    writer = await asyncio.to_thread(SparseWriter, target)
    checked = 0
    try:
        chunks = response.chunks()
        while (chunk := await _next_chunk(chunks, url, policy)) is not None:
            if writer.size_bytes + len(chunk) > policy.max_bytes:
                raise ImageTooLarge(image=shown(url), problem=f"more than {policy.max_bytes} bytes")
            if writer.size_bytes - checked >= _SPACE_CHECK_BYTES:
                checked = writer.size_bytes
                await asyncio.to_thread(ensure_free, target.parent, policy.reserve_bytes)
            await asyncio.to_thread(writer.write, chunk)
            on_bytes(writer.size_bytes, total)
        await asyncio.to_thread(writer.finish)
    finally:
        await asyncio.to_thread(writer.close)
    got = response.headers
    validators = Validators(etag=got.get("etag", ""), last_modified=got.get("last-modified", ""))
    return Fetched(sha256=writer.sha256, size_bytes=writer.size_bytes, validators=validators)


async def _next_chunk(chunks: AsyncIterator[bytes], url: str, policy: FetchPolicy) -> bytes | None:
    async with _patience(url, policy):
        return await anext(chunks, None)


class SparseWriter:
    """Writes a file whose blocks of zeros are holes, and counts and hashes what it is given. Blocking."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._state = hashlib.sha256()
        self._partial = b""
        self.size_bytes = 0

    @property
    def sha256(self) -> str:
        """Of everything written so far; 64 hex digits."""
        return self._state.hexdigest()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._state.update(data)
        self.size_bytes += len(data)
        data = self._partial + data
        whole = len(data) - len(data) % _HOLE_BYTES
        offset = self.size_bytes - len(data)
        self._partial = data[whole:]
        start = None
        for at in range(0, whole, _HOLE_BYTES):
            is_hole = data[at : at + _HOLE_BYTES] == _ZEROS
            if is_hole and start is not None:
                _write_all(self._fd, data[start:at], offset + start)
                start = None
            elif not is_hole and start is None:
                start = at
        if start is not None:
            _write_all(self._fd, data[start:whole], offset + start)

    def finish(self) -> None:
        """Write what is left and give the file its length and its place on the disk."""
        _write_all(self._fd, self._partial, self.size_bytes - len(self._partial))
        self._partial = b""
        os.ftruncate(self._fd, self.size_bytes)
        os.fsync(self._fd)

    def close(self) -> None:
        """Once."""
        os.close(self._fd)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
