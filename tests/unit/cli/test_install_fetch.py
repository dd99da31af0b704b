"""Files of others, from a server that misbehaves: nothing is kept but the file that was meant."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fusevm.cli.install.fetch import Limits, download, is_whole, take_local
from fusevm.model.errors import DigestMismatch, FetchFailed

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str]] = []
        self.released = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_words: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.requests.append((self.path, wanted))
        getattr(self, "answer_" + self.path.strip("/"))(int(wanted[6:-1]) if wanted else 0)

    def begin(self, length: int | None, status: int = 200) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def answer_whole(self, _start: int) -> None:
        self.begin(len(CONTENT))
        self.wfile.write(CONTENT)

    def answer_cut_off(self, start: int) -> None:
        """A third at a time, and then the connection ends."""
        self.begin(len(CONTENT) - start, 206 if start else 200)
        self.wfile.write(CONTENT[start : start + len(CONTENT) // 3 + 1])

    def answer_always_cut_off(self, start: int) -> None:
        self.begin(len(CONTENT) - start, 206 if start else 200)
        self.wfile.write(CONTENT[start : start + 1000])

    def answer_stalled(self, _start: int) -> None:
        self.begin(len(CONTENT))
        self.wfile.write(CONTENT[:1000])
        self.wfile.flush()
        self.server.released.wait(60)

    def answer_endless(self, _start: int) -> None:
        self.begin(None)
        with contextlib.suppress(OSError):
            while not self.server.released.is_set():
                self.wfile.write(CONTENT)

    def answer_drip(self, _start: int) -> None:
        """Never silent for long, never done."""
        self.begin(len(CONTENT))
        with contextlib.suppress(OSError):
            while not self.server.released.wait(0.02):
                self.wfile.write(b"x")
                self.wfile.flush()

    def answer_missing(self, _start: int) -> None:
        self.begin(0, 404)

    def answer_broken(self, _start: int) -> None:
        self.begin(0, 503)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_with_the_right_digest_is_kept(server: Server, tmp_path: Path):
    seen = []
    download(server.url("whole"), SHA256, tmp_path / "file", lambda done, total: seen.append((done, total)))
    assert is_whole(tmp_path / "file", SHA256)
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert left(tmp_path) == ["file"]


def test_a_wrong_digest_is_refused_with_both_and_nothing_is_kept(server: Server, tmp_path: Path):
    with pytest.raises(DigestMismatch) as raised:
        download(server.url("whole"), "a" * 64, tmp_path / "file")
    assert (raised.value.wanted, raised.value.found) == ("a" * 64, SHA256)
    assert left(tmp_path) == []


def test_a_transfer_that_is_cut_off_goes_on_where_it_stopped(server: Server, tmp_path: Path):
    download(server.url("cut_off"), SHA256, tmp_path / "file")
    assert is_whole(tmp_path / "file", SHA256)
    third = len(CONTENT) // 3 + 1
    assert [wanted for _, wanted in server.requests] == ["", f"bytes={third}-", f"bytes={2 * third}-"]


def test_what_came_is_kept_for_the_next_run(server: Server, tmp_path: Path):
    with pytest.raises(FetchFailed, match="cut off"):
        download(server.url("always_cut_off"), SHA256, tmp_path / "file", limits=Limits(attempts=2))
    assert left(tmp_path) == ["file.part"]
    download(server.url("whole"), SHA256, tmp_path / "file")
    assert left(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [("stalled", "nothing came for too long"), ("drip", "did not end within"), ("endless", "more than the")],
)
def test_one_that_does_not_come_to_an_end_is_given_up(server: Server, tmp_path: Path, path: str, problem: str):
    limits = Limits(stall_s=0.2 if path == "stalled" else 30.0, total_s=0.3, max_bytes=4 << 20, attempts=1)
    with pytest.raises(FetchFailed, match=problem):
        download(server.url(path), SHA256, tmp_path / "file", limits=limits)
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(("path", "asked"), [("missing", 1), ("broken", 3)])
def test_a_refusal_is_told_and_asked_again_only_where_that_may_help(
    server: Server, tmp_path: Path, path: str, asked: int
):
    with pytest.raises(FetchFailed, match="404" if path == "missing" else "503"):
        download(server.url(path), SHA256, tmp_path / "file", limits=Limits(attempts=3))
    assert len(server.requests) == asked


def test_a_server_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(FetchFailed, match="refused"):
        download("http://127.0.0.1:9/file", SHA256, tmp_path / "file", limits=Limits(attempts=1))


def test_what_was_brought_here_is_held_to_its_digest_too(tmp_path: Path):
    (tmp_path / "brought").write_bytes(CONTENT)
    take_local(tmp_path / "brought", SHA256, tmp_path / "new" / "file")
    assert is_whole(tmp_path / "new" / "file", SHA256)
    with pytest.raises(DigestMismatch):
        take_local(tmp_path / "brought", "a" * 64, tmp_path / "other" / "file")
    assert left(tmp_path / "other") == []
