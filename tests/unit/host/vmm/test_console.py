"""Console logs: bounded, newest kept; floods are slowed, not fatal."""

import asyncio
import os
import socket

import pytest

from fusevm.host.vmm.console import ConsoleLog, ConsoleReader, FifoReader, PipeReader, last_lines


@pytest.fixture
def log(tmp_path):
    log = ConsoleLog(tmp_path / "console.log", 1000)
    yield log
    log.close()


def content(tmp_path) -> bytes:
    """Old part and new part."""
    paths = [tmp_path / "console.log.1", tmp_path / "console.log"]
    return b"".join(p.read_bytes() for p in paths if p.exists())


@pytest.mark.parametrize("piece", [1, 7, 400, 1000, 12345])
def test_the_newest_bytes_are_kept_within_the_limit(log, tmp_path, piece):
    everything = b"".join(b"%06d\n" % i for i in range(4000))
    for at in range(0, len(everything), piece):
        log.write(everything[at : at + piece])
        assert len(content(tmp_path)) <= 1000
    kept = content(tmp_path)
    assert everything.endswith(kept)
    assert len(kept) >= 500 - 1


def test_an_existing_log_is_continued(log, tmp_path):
    log.write(b"first\n")
    log.close()
    second = ConsoleLog(tmp_path / "console.log", 1000)
    assert second.tail == b""
    second.load_tail()
    second.write(b"second\n")
    assert second.tail == content(tmp_path) == b"first\nsecond\n"
    second.close()


def test_a_log_that_cannot_be_written_only_counts(tmp_path):
    log = ConsoleLog(tmp_path / "missing" / "console.log", 1000)
    log.write(b"lost")
    assert log.lost_bytes == 4
    assert log.tail == b"lost"


def test_a_link_in_place_of_the_log_is_not_followed(log, tmp_path):
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "console.log").symlink_to(tmp_path / "target")
    log.write(b"x")
    assert log.lost_bytes == 1
    assert (tmp_path / "target").read_bytes() == b"precious"


async def test_a_reader_writes_what_comes_and_sees_the_end(log, tmp_path):
    ours, theirs = socket.socketpair()
    reader = await ConsoleReader.start(ours, log)
    theirs.sendall(b"hello\n")
    theirs.close()
    await reader.ended
    assert content(tmp_path) == b"hello\n"
    assert reader.pauses == 0


async def test_a_flood_is_slowed_and_goes_on(log, monkeypatch):
    monkeypatch.setattr("fusevm.host.vmm.console._BURST", 1000)
    monkeypatch.setattr("fusevm.host.vmm.console._PAUSE_S", 0.01)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    reader = await ConsoleReader.start(ours, log)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60):
        for _ in range(300):
            await loop.sock_sendall(theirs, bytes(50))
            await asyncio.sleep(0)
        assert reader.pauses > 0
        theirs.close()
        reader.drain()
        await reader.ended


async def test_closing_a_reader_that_is_paused_leaves_no_timer(log, monkeypatch):
    monkeypatch.setattr("fusevm.host.vmm.console._BURST", 0)
    ours, theirs = socket.socketpair()
    reader = await ConsoleReader.start(ours, log)
    theirs.sendall(b"x")
    while not reader.pauses:
        await asyncio.sleep(0)
    reader.close()
    await reader.ended
    theirs.close()


async def test_a_pipe_keeps_what_was_said_while_nobody_read(tmp_path):
    path = tmp_path / "vmm.out"
    os.mkfifo(path)
    vmm = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.write(vmm, b"early ")
    heard = bytearray()
    first = PipeReader(path, heard.extend)
    await asyncio.sleep(0.01)
    first.close()
    os.write(vmm, b"meanwhile ")
    second = PipeReader(path, heard.extend)
    os.write(vmm, b"late")
    os.close(vmm)
    await second.ended
    assert bytes(heard) == b"early meanwhile late"


@pytest.fixture
def fifo(tmp_path):
    """A named pipe, and its writer's end."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    yield path, writer
    os.close(writer)


async def test_a_writer_of_a_fifo_may_come_and_go(fifo):
    path, writer = fifo
    said = bytearray()
    reader = FifoReader(path, said.extend)
    for word in (b"one", b"two"):
        os.write(writer, word)
        async with asyncio.timeout(30):
            while not said.endswith(word):
                await asyncio.sleep(0.001)
    os.write(writer, b"last")
    reader.drain()
    reader.close()
    reader.close()
    assert said == b"onetwolast"


async def test_a_flooded_fifo_is_read_at_a_bounded_rate_and_goes_on(fifo, monkeypatch):
    monkeypatch.setattr("fusevm.host.vmm.console._BURST", 1000)
    monkeypatch.setattr("fusevm.host.vmm.console._PAUSE_S", 0.01)
    path, writer = fifo
    said = bytearray()
    reader = FifoReader(path, said.extend)
    os.write(writer, bytes(5000))
    async with asyncio.timeout(30):
        while not reader.pauses:
            await asyncio.sleep(0.001)
        os.write(writer, b"end")
        while not said.endswith(b"end"):
            await asyncio.sleep(0.001)
    reader.close()


async def test_draining_a_fifo_that_is_still_written_to_ends(fifo):
    path, writer = fifo
    reader = FifoReader(path, lambda _data: os.write(writer, b"more"))
    os.write(writer, b"first")
    reader.drain()
    reader.close()


@pytest.mark.parametrize("kind", ["link", "file"])
async def test_only_a_fifo_itself_is_read(fifo, tmp_path, kind):
    path = tmp_path / kind
    if kind == "link":
        path.symlink_to(fifo[0])
    else:
        path.write_bytes(b"")
    with pytest.raises(OSError):
        FifoReader(path, lambda _data: None)


async def test_a_fifo_of_another_user_is_not_read(fifo, tmp_path):
    """The folder is the writer's, who may put a link in its place to that of another machine."""
    (tmp_path / "run").symlink_to(tmp_path)
    path = tmp_path / "run" / "fifo"
    with pytest.raises(PermissionError):
        FifoReader(path, lambda _data: None, uid=os.geteuid() + 1)
    FifoReader(path, lambda _data: None, uid=os.geteuid()).close()


def test_last_lines_are_printable_and_few():
    data = b"\r\n".join(b"line %d \x1b[1mbold\x1b[0m\x00" % i for i in range(50))
    assert last_lines(data, count=2) == "line 48 bold\nline 49 bold"
    assert last_lines(b"\n\n") == ""
    assert len(last_lines(b"x" * 5000)) == 600
