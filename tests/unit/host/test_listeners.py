"""The API's listeners before anybody has looked at a token: what strangers may cost; who holds an instance's name."""

import asyncio
import contextlib
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fusevm.host.boundary import Boundary
from fusevm.host.config import Listen
from fusevm.host.listeners import bind_tcp, find_instance_lock, lock_instance, serving
from fusevm.host.metrics import Metrics
from fusevm.host.name_lock import name_lock
from fusevm.model.errors import BadSetting, PortInUse
from fusevm.wire import http_protocol
from fusevm.wire.errors import parse_error

TIMEOUT_S = 60
GET = b"GET /info HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /machines HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
MANY = 1 << 20


async def nothing_behind(*_: object) -> None:
    raise AssertionError("nobody has shown a token")


@contextlib.asynccontextmanager
async def stranger() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a listener that wants a token."""
    with bind_tcp(Listen(host="127.0.0.1", port=0)) as sock:
        port = sock.getsockname()[1]
        async with serving(sock, Boundary(nothing_behind, Metrics(), secret="secret")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                yield reader, writer
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()


async def last_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the answer after which the server has closed."""
    async with asyncio.timeout(TIMEOUT_S):
        said = await reader.read()
    head, _, body = said[said.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize(
    "sent",
    [
        GET + b"x: " + b"a" * MANY,
        GET + b"x: aaaaaaaaaaaa\r\n" * (MANY // 16),
        b"GET /" + b"a" * MANY,
        POST + b"1\r\nx\r\n0\r\nx: " + b"a" * MANY,
        POST + b"1\r\nx\r\n0\r\n" + b"x: aaaaaaaaaaaa\r\n" * (MANY // 16),
        POST + b"1;x=" + b"a" * MANY,
    ],
    ids=["header", "headers", "path", "trailer", "trailers", "extension"],
)
async def test_what_has_no_end_is_given_up(sent: bytes):
    async with stranger() as (reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(sent)
        status, body = await last_answer(reader)
        assert (status, parse_error(status, body).code) == (431, "payload_too_large")


@pytest.mark.parametrize("sent", [b"", b"G", GET])
async def test_a_head_that_does_not_arrive_is_given_up(sent: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    async with stranger() as (reader, writer):
        writer.write(sent)
        status, body = await last_answer(reader)
        assert (status, parse_error(status, body).code) == (408, "timeout")


async def test_a_body_in_many_small_pieces_is_no_head():
    """What surrounds its pieces is more than a head may be."""
    async with stranger() as (reader, writer):
        for _ in range(2):
            writer.write(POST + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n")
            async with asyncio.timeout(TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 401 ")
                length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split()[1]))


# -- names -------------------------------------------------------------------------------------------------------------


def test_the_name_of_an_instance_is_held_once():
    with lock_instance("t-once"):
        with pytest.raises(PortInUse, match="instance 't-once'"), lock_instance("t-once"):
            pass
        with lock_instance("t-other"):
            pass
    with lock_instance("t-once"):
        pass


def test_no_other_user_can_take_the_name_of_an_instance():
    """Names of sockets belong to whoever comes first."""
    with lock_instance("t-taken"):
        assert "t-taken" not in Path("/proc/net/unix").read_text()
    names = [f"\0fuse-host-{uid}-t-taken" for uid in (0, 1000)]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(name)
        stack.enter_context(lock_instance("t-taken"))


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like /tmp, in which users without a runtime directory have their own."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr("fusevm.host.listeners.default_run_dir", lambda instance: folder / instance)
    return folder


def test_where_anybody_may_make_files_the_name_of_an_instance_is_held_in_a_folder_of_ours(shared: Path):
    with name_lock(shared / "t-tmp.lock") as is_theirs:
        assert is_theirs
        with lock_instance("t-tmp"), pytest.raises(PortInUse), lock_instance("t-tmp"):
            pass
    assert stat.S_IMODE((shared / "t-tmp").stat().st_mode) == 0o700
    with lock_instance("t-tmp"):
        pass
    assert list((shared / "t-tmp").iterdir()) == []


@pytest.mark.parametrize(
    "make",
    [Path.touch, lambda path: path.symlink_to(path.parent), lambda path: path.mkdir() or path.chmod(0o777)],
    ids=["file", "link", "open to all"],
)
def test_a_folder_that_others_have_made_there_is_not_used(shared: Path, make: Callable[[Path], object]):
    make(shared / "t-tmp")
    with pytest.raises(BadSetting, match="XDG_RUNTIME_DIR"), lock_instance("t-tmp"):
        pass


def test_where_there_is_no_folder_at_all_the_setting_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fusevm.host.listeners.default_run_dir", lambda instance: tmp_path / "missing" / instance)
    with pytest.raises(BadSetting, match="missing cannot be made"):
        find_instance_lock("t-none")


def test_the_file_of_a_lock_is_for_its_owner_and_goes_with_its_holder(tmp_path: Path):
    path = tmp_path / "a.lock"
    with name_lock(path) as is_ours:
        assert is_ours
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with name_lock(path) as is_theirs:
            assert not is_theirs
        assert path.exists()
    assert not path.exists()


def test_a_lock_is_no_link_to_something_else(tmp_path: Path):
    (tmp_path / "a.lock").symlink_to(tmp_path / "b")
    with pytest.raises(OSError, match="symbolic links"), name_lock(tmp_path / "a.lock"):
        pass
    assert not (tmp_path / "b").exists()


def test_a_lock_ends_with_a_killed_holder(tmp_path: Path):
    path = tmp_path / "a.lock"
    hold = "import sys, pathlib, fusevm.host.name_lock as n\nwith n.name_lock(pathlib.Path(sys.argv[1])) as is_ours:\n"
    command = [sys.executable, "-c", hold + "    print(is_ours, flush=True); sys.stdin.read()", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with name_lock(path) as is_ours:
            assert not is_ours
        holder.kill()
        holder.wait()
    with name_lock(path) as is_ours:
        assert is_ours
    assert not path.exists()


def test_of_many_that_come_and_go_one_at_a_time_holds_a_lock(tmp_path: Path):
    """Also while its file is removed and made anew."""
    inside: list[int] = []
    most: list[int] = []

    def come_and_go(number: int) -> None:
        for _ in range(300):
            with name_lock(tmp_path / "a.lock") as is_ours:
                if is_ours:
                    inside.append(number)
                    most.append(len(inside))
                    inside.remove(number)

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
