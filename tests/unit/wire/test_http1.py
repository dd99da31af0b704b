"""The HTTP/1.1 client against servers that behave well, badly, early and not at all (plain sockets on loopback)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from fusevm.wire.http1 import Connection, ProtocolError
from fusevm.wire.streams import open_tcp

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Script = Callable[[Reader, Writer], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@asynccontextmanager
async def connected(script: Script) -> AsyncIterator[Connection]:
    """A connection to a server that plays one script per connection; a script that fails, fails the test."""
    failures: list[BaseException] = []

    async def play(reader: Reader, writer: Writer) -> None:
        try:
            await script(reader, writer)
        except ConnectionError:
            pass  # the client went away first
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            writer.close()

    server = await asyncio.start_server(play, "127.0.0.1", 0)
    connection = Connection(await open_tcp("127.0.0.1", server.sockets[0].getsockname()[1]), "fuse.test")
    try:
        async with asyncio.timeout(60):
            yield connection
    finally:
        await connection.close()
        server.close()
        await server.wait_closed()
    assert not failures, failures


def says(answer: bytes) -> Script:
    """A server that reads one head and says this."""

    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    return script


async def read_chunk(reader: Reader) -> bytes:
    size = int((await reader.readuntil(b"\r\n")).strip(), 16)
    return (await reader.readexactly(size + 2))[:-2]


async def pieces(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


# -- requests ------------------------------------------------------------------------------------------------------


async def test_a_request_carries_its_target_host_and_headers():
    async def script(reader: Reader, writer: Writer) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("get /a%20b?x=1 http/1.1\r\n")
        assert "\r\nhost: fuse.test\r\n" in head
        assert "\r\nx-more: yes\r\n" in head
        assert "content-length" not in head
        writer.write(OK)

    async with connected(script) as connection:
        response = await connection.request("GET", "/a%20b?x=1", headers={"x-more": "yes"})
        assert response.status == 200
        assert await response.read() == b"hello"


async def test_a_body_of_bytes_is_sent_with_its_length():
    async def script(reader: Reader, writer: Writer) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert "content-length: 3" in head
        assert await reader.readexactly(3) == b"abc"
        writer.write(OK)

    async with connected(script) as connection:
        assert (await connection.request("PUT", "/", body=b"abc")).status == 200


async def test_an_empty_body_is_a_body_of_length_zero():
    async def script(reader: Reader, writer: Writer) -> None:
        assert "content-length: 0" in (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        writer.write(OK)

    async with connected(script) as connection:
        assert (await connection.request("POST", "/", body=b"")).status == 200


async def test_a_body_is_streamed_while_it_is_made():
    heard = asyncio.Event()

    async def script(reader: Reader, writer: Writer) -> None:
        assert "transfer-encoding: chunked" in (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert await read_chunk(reader) == b"one"
        heard.set()
        assert await read_chunk(reader) == b"two"
        assert await read_chunk(reader) == b""
        writer.write(OK)

    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        await heard.wait()  # the first piece has arrived before the second exists
        yield b""
        yield b"two"

    async with connected(script) as connection:
        response = await connection.request("POST", "/", body=body())
        assert await response.read() == b"hello"
        assert connection.is_reusable


async def test_a_streamed_body_of_known_length_is_not_chunked():
    async def script(reader: Reader, writer: Writer) -> None:
        assert "transfer-encoding" not in (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert await reader.readexactly(6) == b"onetwo"
        writer.write(OK)

    async with connected(script) as connection:
        response = await connection.request("PUT", "/", headers={"Content-Length": "6"}, body=pieces(b"one", b"two"))
        assert response.status == 200


async def test_an_answer_is_read_while_it_is_made():
    read = asyncio.Event()

    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await writer.drain()
        await read.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")

    async with connected(script) as connection:
        response = await connection.request("GET", "/")
        got = []
        async for chunk in response.chunks():
            got.append(chunk)
            read.set()
        assert got == [b"one", b"two"]


async def test_a_body_that_fails_to_be_made_fails_the_request():
    async def script(reader: Reader, writer: Writer) -> None:
        while await reader.read(1000):
            pass

    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        raise LookupError("the file went away")

    async with connected(script) as connection:
        with pytest.raises(LookupError, match="the file went away"):
            await connection.request("POST", "/", body=body())
        assert not connection.is_reusable


# -- answers that come early ---------------------------------------------------------------------------------------


async def test_an_answer_before_the_end_of_the_body_ends_the_sending():
    gave_up = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 65536
        finally:
            gave_up.set()

    too_large = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno"
    async with connected(says(too_large)) as connection:
        body = endless()
        async with await connection.request("POST", "/", body=body) as response:
            assert response.status == 413
            assert await response.read() == b"no"
        assert not connection.is_reusable
        await body.aclose()
        assert gave_up.is_set()


async def test_an_early_answer_is_heard_while_the_body_has_nothing_to_say():
    async def silent() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async with connected(says(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")) as connection:
        response = await connection.request("POST", "/", body=silent())
        assert (response.status, await response.read()) == (403, b"")
        assert not connection.is_reusable


async def test_informational_answers_are_skipped():
    async with connected(says(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + OK)) as connection:
        assert (await connection.request("GET", "/")).status == 200


# -- reuse ---------------------------------------------------------------------------------------------------------


async def test_a_connection_is_used_again_after_a_whole_answer():
    async def script(reader: Reader, writer: Writer) -> None:
        for number in range(3):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /%d " % number)
            writer.write(OK)

    async with connected(script) as connection:
        for number in range(3):
            async with await connection.request("GET", f"/{number}") as response:
                assert not connection.is_reusable
                assert await response.read() == b"hello"
            assert connection.is_reusable


async def test_an_answer_that_is_left_half_read_closes_the_connection():
    async with connected(says(OK)) as connection:
        async with await connection.request("GET", "/"):
            pass
        assert not connection.is_reusable


async def test_a_server_that_closes_after_its_answer_leaves_nothing_to_reuse():
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"
    async with connected(says(answer)) as connection:
        assert await (await connection.request("GET", "/")).read() == b"hello"
        assert not connection.is_reusable


async def test_an_answer_without_a_length_ends_with_the_connection():
    async with connected(says(b"HTTP/1.1 200 OK\r\n\r\nall there is")) as connection:
        assert await (await connection.request("GET", "/")).read() == b"all there is"
        assert not connection.is_reusable


# -- answers that break --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    ],
)
async def test_a_body_that_is_cut_off_is_an_error(answer: bytes):
    async with connected(says(answer)) as connection:
        response = await connection.request("GET", "/")
        with pytest.raises(ProtocolError):
            await response.read()
        assert not connection.is_reusable


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 200_000],
)
@pytest.mark.parametrize("with_body", [False, True])
async def test_what_is_no_answer_is_an_error(answer: bytes, with_body: bool):
    async with connected(says(answer)) as connection:
        with pytest.raises(ConnectionError):
            await connection.request("POST", "/", body=pieces(b"one") if with_body else None)
        assert not connection.is_reusable


async def test_an_answer_over_the_limit_is_an_error():
    async with connected(says(OK)) as connection:
        response = await connection.request("GET", "/")
        with pytest.raises(ProtocolError, match="longer than 4 bytes"):
            await response.read(limit=4)


async def test_a_request_that_is_given_up_breaks_the_connection():
    async def script(reader: Reader, writer: Writer) -> None:
        while await reader.read(1000):
            pass

    async with connected(script) as connection:
        for body in (None, pieces(b"one")):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await connection.request("GET", "/", body=body)
            break
        assert not connection.is_reusable


async def test_a_streamed_request_that_is_given_up_leaves_no_task_behind():
    up = asyncio.Event()

    async def script(reader: Reader, writer: Writer) -> None:
        up.set()
        while await reader.read(1000):
            pass

    async with connected(script) as connection:
        await up.wait()  # the server's task is none of ours
        before = asyncio.all_tasks()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connection.request("POST", "/", body=pieces(b"one"))
        assert asyncio.all_tasks() == before
        assert not connection.is_reusable


async def test_closing_twice_is_harmless():
    async with connected(says(OK)) as connection:
        await connection.close()
        await connection.close()
        assert not connection.is_reusable


# -- upgrades ------------------------------------------------------------------------------------------------------


async def test_an_upgrade_hands_over_the_stream_and_what_came_with_it():
    async def script(reader: Reader, writer: Writer) -> None:
        assert b"pgrade: fuse-frames/1" in await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: fuse-frames/1\r\nConnection: Upgrade\r\n\r\nfirst bytes"
        )
        assert await reader.readexactly(4) == b"ping"
        writer.write(b"pong")

    async with connected(script) as connection:
        headers = {"Upgrade": "fuse-frames/1", "Connection": "Upgrade"}
        response = await connection.request("GET", "/exec", headers=headers)
        assert (response.status, response.headers["upgrade"]) == (101, "fuse-frames/1")
        stream, rest = connection.upgraded()
        while len(rest) < len(b"first bytes"):
            rest += await stream.read(100)
        assert rest == b"first bytes"
        await stream.write(b"ping")
        assert await stream.read(100) == b"pong"
        assert not connection.is_reusable


async def test_a_refused_upgrade_is_an_ordinary_answer():
    refusal = b"HTTP/1.1 409 Conflict\r\nContent-Length: 4\r\n\r\nbusy"
    async with connected(says(refusal)) as connection:
        headers = {"Upgrade": "fuse-frames/1", "Connection": "Upgrade"}
        response = await connection.request("GET", "/exec", headers=headers)
        assert (response.status, await response.read()) == (409, b"busy")
