"""The asynchronous client against a real server on loopback: the same calls, the same errors."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from fake_api import CUT, TOKEN, FakeApi, make_environment, to_json

from fusevm.model.errors import CommandNotFound, EnvironmentNotFound, StartupFailed, TaskExists, Timeout
from fusevm.sdk import AsyncFuse
from fusevm.sdk.failures import ConnectionLost, ServerUnreachable
from fusevm.wire.rest import EventBody


@pytest.fixture
async def fuse(api: FakeApi) -> AsyncIterator[AsyncFuse]:
    async with AsyncFuse(api.url, TOKEN) as client:
        yield client


async def test_life_of_an_environment(api: FakeApi, fuse: AsyncFuse) -> None:
    env = await fuse.environments.create("one", image="debian-12")
    assert env.state == "running"
    with pytest.raises(TaskExists):
        await fuse.environments.create("one")
    assert (await fuse.environments.drain(env.id)).state == "draining"
    await fuse.environments.delete(env.id)
    with pytest.raises(EnvironmentNotFound):
        await fuse.environments.get(env.id)
    assert [e.state async for e in fuse.environments.list(ended=True)] == ["destroyed"]
    assert (await fuse.version()).version == "9.9.9"
    assert (await fuse.ready()).status == "ready"
    assert [host.id async for host in fuse.hosts.list()] == ["default"]


async def test_create_is_repeated_with_the_same_key(api: FakeApi, fuse: AsyncFuse) -> None:
    api.script("POST", "/v1/environments", lambda: CUT)
    assert (await fuse.environments.create("again")).state == "running"
    assert len({headers["idempotency-key"] for _, _, headers, _ in api.requests}) == 1


async def test_exec_is_not_repeated(api: FakeApi, fuse: AsyncFuse) -> None:
    api.add("a")
    api.script("POST", "/v1/environments/fuse-a", lambda: CUT)
    with pytest.raises(ConnectionLost):
        await fuse.environments.exec("fuse-a", ["true"])
    assert (await fuse.environments.exec("fuse-a", ["echo", "x"])).stdout == "x\n"


async def test_create_gives_up_waiting_at_its_deadline(api: FakeApi, fuse: AsyncFuse) -> None:
    early = make_environment("slow", "provisioning")
    api.script("POST", "/v1/environments", lambda: to_json(early, 201))
    api.add("slow", "provisioning")
    with pytest.raises(Timeout):
        await fuse.environments.create("slow", deadline_s=0.01)


async def test_create_of_what_ends_instead_of_coming_up_raises_why(api: FakeApi, fuse: AsyncFuse) -> None:
    early = make_environment("bad", "provisioning")
    api.script("POST", "/v1/environments", lambda: to_json(early, 201))
    api.ended[early.uid] = make_environment("bad", "failed", reason="startup_failed", error="exit status 3")
    with pytest.raises(StartupFailed, match="exit status 3") as caught:
        await fuse.environments.create("bad")
    assert caught.value.details["uid"] == early.uid


async def test_nobody_listening_is_server_unreachable() -> None:
    async with AsyncFuse("127.0.0.1:9") as fuse:
        with pytest.raises(ServerUnreachable):
            await fuse.version()
        with pytest.raises(ServerUnreachable):
            async with fuse.environments.exec_stream("fuse-a", ["true"]):
                pass


async def test_files_and_streams(api: FakeApi, fuse: AsyncFuse) -> None:
    api.add("a")
    files = fuse.environments.files("fuse-a")
    data = bytes(range(256)) * 4000

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 50_000):
            yield data[start : start + 50_000]

    await files.write("/d/x", pieces())
    assert await files.read("/d/x") == data
    async with fuse.environments.archive("fuse-a").get("/d") as tar:
        packed = b"".join([piece async for piece in tar])
    await files.mkdir("/e")

    async def whole() -> AsyncIterator[bytes]:
        yield packed

    assert (await fuse.environments.archive("fuse-a").put("/e", whole())).entries == 2
    assert await files.read("/e/d/x") == data
    assert b"".join([piece async for piece in fuse.environments.logs("fuse-a")]) == api.log


async def test_events(api: FakeApi, fuse: AsyncFuse) -> None:
    api.add("a")
    api.events = [EventBody(id="1", event="state", vm_id="fuse-a", uid="u", state="destroyed", updated_at="t")]
    assert [event.id async for event in fuse.environments.events("fuse-a")] == ["1"]


async def test_a_session_echoes_more_than_all_buffers_hold(api: FakeApi, fuse: AsyncFuse) -> None:
    api.add("a")
    data = bytes(range(256)) * 4096 * 4

    async with fuse.environments.exec_stream("fuse-a", ["cat"]) as session:

        async def feed() -> None:
            await session.send_stdin(data)
            await session.close_stdin()

        feeding = asyncio.create_task(feed())
        echoed = b"".join([frame.payload async for frame in session.frames()])
        await feeding
    assert echoed == data
    assert session.exit is not None
    assert session.exit.exit_code == 0


async def test_refused_sessions_raise_the_servers_error(api: FakeApi, fuse: AsyncFuse) -> None:
    with pytest.raises(EnvironmentNotFound):
        async with fuse.environments.shell("fuse-none"):
            pass
    api.add("a")
    async with fuse.environments.exec_stream("fuse-a", ["/no/such"]) as session:
        with pytest.raises(CommandNotFound):
            await session.wait()
