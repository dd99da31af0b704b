"""Downloads of URLs that somebody else chose."""

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from file_server import ok, redirect, serving

from fusevm.host.images.addresses import parse_networks
from fusevm.host.images.fetch import FetchPolicy, SparseWriter, Validators, fetch, parse_url, shown
from fusevm.model.errors import (
    AddressRefused,
    ArtifactRefused,
    DigestMismatch,
    FetchFailed,
    ImageTooLarge,
    NoSpace,
)

LOOPBACK = parse_networks(["127.0.0.0/8"])
OPEN = FetchPolicy(allowed=LOOPBACK, max_bytes=1 << 20, timeout_s=60, silence_s=30)
BODY = os.urandom(10_000) + bytes(300_000) + os.urandom(5_001)


async def test_a_file_arrives_whole_sparse_and_with_its_digest(tmp_path: Path):
    async with serving(lambda _target, _headers: ok(BODY, 'ETag: "v1"', "Last-Modified: now")) as server:
        heard: list[tuple[int, int | None]] = []
        got = await fetch(server.url("/f"), tmp_path / "f", OPEN, on_bytes=lambda *said: heard.append(said))
    assert got is not None
    assert (tmp_path / "f").read_bytes() == BODY
    assert (got.sha256, got.size_bytes) == (hashlib.sha256(BODY).hexdigest(), len(BODY))
    assert got.validators == Validators(etag='"v1"', last_modified="now")
    assert heard[-1] == (len(BODY), len(BODY))
    assert (tmp_path / "f").stat().st_blocks * 512 < 100_000


async def test_loopback_and_private_addresses_are_refused_by_default(tmp_path: Path):
    asked = []
    async with serving(lambda target, _headers: asked.append(target) or ok(b"secret")) as server:
        for url in (server.url("/"), f"http://localhost:{server.port}/", f"http://[::ffff:127.0.0.1]:{server.port}/"):
            with pytest.raises(AddressRefused, match="artifact-networks"):
                await fetch(url, tmp_path / "f", FetchPolicy())
    for url in ("http://169.254.169.254/latest/meta-data", "http://10.0.0.1/", "https://[fd00::1]/", "http://0/"):
        with pytest.raises(AddressRefused):
            await fetch(url, tmp_path / "f", FetchPolicy(silence_s=5))
    assert asked == []
    assert list(tmp_path.iterdir()) == []


async def test_every_redirect_is_checked_anew(tmp_path: Path):
    def answer(target: str, _headers: dict[str, str]) -> bytes:
        return redirect(
            "http://169.254.169.254/latest/meta-data/iam" if target == "/out" else f"http://127.0.0.1{'/out'}"
        )

    async with serving(answer) as server:
        with pytest.raises(AddressRefused, match=r"169\.254"):
            await fetch(server.url("/out"), tmp_path / "f", OPEN)
        assert server.requests == ["/out"]


async def test_redirects_are_followed_and_end(tmp_path: Path):
    def answer(target: str, _headers: dict[str, str]) -> bytes:
        return {"/a": redirect("/b"), "/b": redirect("c?x=1", "308 Permanent Redirect"), "/c?x=1": ok(BODY)}.get(
            target, redirect("/loop")
        )

    async with serving(answer) as server:
        assert await fetch(server.url("/a"), tmp_path / "f", OPEN) is not None
        with pytest.raises(ArtifactRefused, match="redirects more than"):
            await fetch(server.url("/loop"), tmp_path / "g", OPEN)
    async with serving(lambda _target, _headers: ok(b"", status="302 Found")) as server:
        with pytest.raises(ArtifactRefused, match="nowhere"):
            await fetch(server.url("/"), tmp_path / "g", OPEN)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


async def test_a_name_that_changes_its_address_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was checked is what is connected to: a second answer of the name server has no say."""
    async with serving(lambda _target, _headers: ok(b"inside")) as server:
        loop, answers = asyncio.get_running_loop(), iter(["93.184.216.34", "127.0.0.1", "127.0.0.1"])

        async def rebinding(host: str, port: int, **_more: object) -> list[object]:
            return [(2, 1, 6, "", (next(answers), port))]

        connected = []

        async def connect(host: str, port: int, **_more: object) -> object:
            connected.append(host)
            raise ConnectionRefusedError("nobody is there")

        monkeypatch.setattr(type(loop), "getaddrinfo", lambda _self, *args, **more: rebinding(*args, **more))
        monkeypatch.setattr(asyncio, "open_connection", connect)
        with pytest.raises(FetchFailed):
            await fetch(f"http://rebind.example:{server.port}/", tmp_path / "f", FetchPolicy())
        assert (connected, server.requests) == (["93.184.216.34"], [])


async def test_what_is_too_large_is_cut_off_declared_or_not(tmp_path: Path):
    async def endless() -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        for _ in range(1000):
            yield b"8000\r\n" + bytes(0x8000) + b"\r\n"

    async with serving(lambda target, _headers: ok(b"", length=1 << 40) if target == "/said" else endless()) as server:
        for path in ("/said", "/endless"):
            with pytest.raises(ImageTooLarge, match="1048576"):
                await fetch(server.url(path), tmp_path / "f", OPEN)
    assert list(tmp_path.iterdir()) == []


async def test_a_full_disk_refuses_before_the_download(tmp_path: Path):
    async with serving(lambda _target, _headers: ok(BODY)) as server:
        policy = FetchPolicy(allowed=LOOPBACK, reserve_bytes=1 << 60)
        with pytest.raises(NoSpace):
            await fetch(server.url("/"), tmp_path / "f", policy)
    assert list(tmp_path.iterdir()) == []


async def test_silence_and_slowness_end(tmp_path: Path):
    async def drip(first: bytes) -> AsyncIterator[bytes]:
        yield first
        while True:
            await asyncio.sleep(0.02)
            yield b"1\r\nx\r\n"

    async def silent() -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc"
        await asyncio.sleep(3600)

    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving(lambda target, _headers: silent() if target == "/silent" else drip(head)) as server:
        quick = FetchPolicy(allowed=LOOPBACK, timeout_s=0.5, silence_s=20)
        with pytest.raises(FetchFailed, match="longer than"):
            await fetch(server.url("/drip"), tmp_path / "f", quick)
        with pytest.raises(FetchFailed, match="nothing came"):
            await fetch(server.url("/silent"), tmp_path / "f", FetchPolicy(allowed=LOOPBACK, silence_s=0.3))
    assert list(tmp_path.iterdir()) == []


async def test_the_wrong_digest_leaves_nothing(tmp_path: Path):
    async with serving(lambda _target, _headers: ok(BODY)) as server:
        with pytest.raises(DigestMismatch) as caught:
            await fetch(server.url("/"), tmp_path / "f", OPEN, sha256="0" * 64)
    assert caught.value.found == hashlib.sha256(BODY).hexdigest()
    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_is_cut_off_is_not_taken(tmp_path: Path):
    async with serving(lambda _target, _headers: ok(BODY, length=len(BODY) + 1)) as server:
        with pytest.raises(FetchFailed):
            await fetch(server.url("/"), tmp_path / "f", OPEN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (ok(b"", status="404 Not Found"), ArtifactRefused, "404"),
        (ok(b"", status="403 Forbidden"), ArtifactRefused, "403"),
        (ok(b"", status="503 Later"), FetchFailed, "503"),
        (ok(b"", status="206 Partial"), ArtifactRefused, "206"),
        (ok(b"", status="304 Not Modified"), ArtifactRefused, "304"),
        (ok(b"xx", "Content-Encoding: gzip"), ArtifactRefused, "gzip"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", FetchFailed, "fetched"),
        (b"", FetchFailed, "fetched"),
    ],
)
async def test_other_answers_are_errors(tmp_path: Path, answer: bytes, kind: type[Exception], words: str):
    async with serving(lambda _target, _headers: answer) as server:
        with pytest.raises(kind, match=words):
            await fetch(server.url("/"), tmp_path / "f", OPEN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/x",
        "file:///etc/passwd",
        "http:///x",
        "example.com/x",
        "http://user:secret@example.com/x",
        "http://example.com/\nx",
        "http://example.com:99999/x",
        "http://[::1/x",
        "http://example.com/" + "x" * 9000,
    ],
)
def test_what_is_no_url_of_a_file_is_refused(url: str):
    with pytest.raises(ArtifactRefused) as caught:
        parse_url(url)
    assert "secret" not in caught.value.message


def test_secrets_of_a_url_are_not_shown():
    assert shown("https://u:p@h.example/path/x?sig=abc#y") == "https://h.example/path/x"


def test_holes_are_written_where_the_zeros_are(tmp_path: Path):
    content = b"a" * 5000 + bytes(20_000) + b"b" + bytes(70_000) + b"c" * 4096 + bytes(8192)
    for step in (1000, 4096, 65536):
        path = tmp_path / str(step)
        writer = SparseWriter(path)
        for at in range(0, len(content), step):
            writer.write(content[at : at + step])
        writer.finish()
        writer.close()
        assert path.read_bytes() == content
        assert writer.sha256 == hashlib.sha256(content).hexdigest()
