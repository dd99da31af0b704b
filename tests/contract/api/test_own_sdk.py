"""Our own client, both faces of it, against a running control plane: hosts, snapshots, keys, what a create brings."""

import asyncio
import base64
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import pytest
from control_harness import Running, running, served, until

from fusevm.model.errors import (
    HostInUse,
    HostNotFound,
    HostUnreachable,
    KeyNotFound,
    LogNotFound,
    NotSupported,
    ScopeMissing,
    SnapshotFailed,
    SnapshotNotFound,
    StartupFailed,
    Timeout,
    WrongState,
)
from fusevm.model.host import Resources
from fusevm.sdk import AsyncFuse, Fuse
from fusevm.sdk.choices import looks
from fusevm.sdk.fleet import raise_unless_whole
from fusevm.testing.fake_host import FakeHost
from fusevm.wire.guest import Exit
from fusevm.wire.rest_fleet import CapacityInput, SnapshotBody

T = TypeVar("T")
TOKEN = "master-token-of-this-test"
MASTER = {"authorization": f"Bearer {TOKEN}"}
EVERYTHING = {
    "manifest": b'{"version": "1", "env": {"KEY": {"secret": "A"}}}',
    "secrets": {"A": "1"},
    "files": {"/etc/a": b"a", "/opt/run": (b"#!/bin/sh", "0755")},
    "startup_script": "echo ready",
    "startup_script_timeout_seconds": 5,
    "agent": {"command": ["/opt/run"]},
    "gateway_url": "https://gateway.example",
    "gateway_token": "t",
    "healthcheck": {"http": {"port": 80}},
    "queue_seconds": 60,
}


@pytest.fixture
async def server() -> AsyncIterator[Running]:
    async with running(auth_token=TOKEN, headers=MASTER) as found:
        yield found


@pytest.fixture
async def fuse(server: Running) -> AsyncIterator[AsyncFuse]:
    async with AsyncFuse(server.url, TOKEN) as client:
        yield client


async def test_everything_that_a_create_can_say_arrives(server: Running, fuse: AsyncFuse) -> None:
    made = await fuse.environments.create("t1", **EVERYTHING)
    assert made.state == "running"
    (guest,) = server.host.guests.values()
    assert guest.setup is not None
    assert base64.b64decode(guest.setup.files["/opt/run"].content_b64) == b"#!/bin/sh"
    assert (guest.setup.files["/opt/run"].mode, guest.setup.files["/etc/a"].mode) == ("0755", "0644")
    assert guest.setup.env["KEY"] == "1"
    assert guest.order is not None
    startup = [piece async for piece in fuse.environments.logs(made.id, source="startup")]
    assert b"".join(startup) == b"fake: echo ready\n"
    agent = [piece async for piece in fuse.environments.logs(made.id, source="agent", follow=True)]
    assert b"".join(agent) == b"fake: /opt/run\n"
    assert await fuse.environments.rotate_token(made.id) is True
    drained = await fuse.environments.drain(made.id)
    assert drained.agent is not None
    assert (drained.state, drained.agent.state) == ("draining", "drained")
    with pytest.raises(WrongState):
        await fuse.environments.rotate_token(made.id)


async def test_a_startup_that_fails_is_an_error_that_says_so(server: Running, fuse: AsyncFuse) -> None:
    server.host.hold["relay"] = asyncio.Event()
    creating = asyncio.create_task(fuse.environments.create("t1", startup_script="false"))
    await until(lambda: server.host.guests)
    next(iter(server.host.guests.values())).exit = Exit(exit_code=3)
    server.host.hold.pop("relay").set()
    with pytest.raises(StartupFailed, match="exit status 3"):
        await creating


async def test_an_environment_without_a_daemon_has_no_such_log(fuse: AsyncFuse) -> None:
    made = await fuse.environments.create("t1")
    with pytest.raises(LogNotFound):
        async for _ in fuse.environments.logs(made.id, source="agent"):
            pass


async def test_the_life_of_a_snapshot(server: Running, fuse: AsyncFuse) -> None:
    made = await fuse.environments.create("t1")
    first = await fuse.snapshots.create(made.id, comment="before", metadata={"name": "base"}, layer_key="k")
    assert (first.state, first.name, first.size_bytes) == ("ready", "base", 1 << 20)
    begun = await fuse.snapshots.begin(made.id)
    found = [one.id async for one in fuse.snapshots.list(vm_id=made.id)]
    assert found == [begun.id, first.id]
    assert [one.id for one in (await fuse.snapshots.page(limit=1)).snapshots] == [begun.id]
    assert [one.id async for one in fuse.snapshots.list(name="base", state="ready")] == [first.id]
    assert (await fuse.snapshots.get(first.id)).id == first.id
    layer = await fuse.snapshots.resolve("k", "amd64")
    assert layer.snapshot is not None
    assert layer.snapshot.id == first.id
    assert (await fuse.snapshots.resolve("no", "amd64")).found is False

    async def is_taken() -> bool:
        return (await fuse.snapshots.get(begun.id)).state == "ready"

    await until(is_taken)
    await fuse.snapshots.restore(first.id)
    await fuse.snapshots.delete(first.id)
    with pytest.raises(SnapshotNotFound):
        await fuse.snapshots.get(first.id)
    await fuse.snapshots.delete(begun.id, wait=False)
    assert server.host.snapshots == {}


async def test_a_host_that_takes_no_snapshots_is_an_error_of_its_class(server: Running, fuse: AsyncFuse) -> None:
    made = await fuse.environments.create("t1")
    server.host.has_snapshots = False
    with pytest.raises(NotSupported):
        await fuse.snapshots.create(made.id)
    (failed,) = [one async for one in fuse.snapshots.list()]
    assert failed.state == "error"


async def test_what_takes_longer_than_the_server_waits_is_waited_for() -> None:
    async with running(wait_s=0.01, lease_s=1.0) as server, AsyncFuse(server.url) as fuse:

        async def slowly(name: str, work: Coroutine[Any, Any, T]) -> T:
            """Hold the host's answer until the client has seen that the server does not wait any longer."""
            server.host.hold[name] = held = asyncio.Event()
            working = asyncio.create_task(work)
            method = "DELETE" if name == "delete_snapshot" else "POST"
            answered = server.plane.metrics.requests.labels(name.replace("take", "create"), method, "202")
            await until(answered._value.get)
            server.host.hold.pop(name)
            held.set()
            return await working

        made = await fuse.environments.create("t1")
        taken = await slowly("take_snapshot", fuse.snapshots.create(made.id))
        assert taken.state == "ready"
        await slowly("restore_snapshot", fuse.snapshots.restore(taken.id))
        await slowly("delete_snapshot", fuse.snapshots.delete(taken.id))
        with pytest.raises(SnapshotNotFound):
            await fuse.snapshots.get(taken.id)


async def test_hosts_are_registered_and_taken_out_of_service(fuse: AsyncFuse) -> None:
    other = FakeHost("h2", capacity=Resources(cpus=8, ram_mb=8192, storage_gb=200, vm_count=20))
    async with served(other) as url:
        host = await fuse.hosts.register("h2", url, region="north", labels={"a": "b"}, capacity=CapacityInput(cpus=4))
        assert (host.capacity.cpus, host.capacity.vm_count, host.region) == (4, 20, "north")
        assert host.warnings
        await fuse.hosts.cordon("h2")
        assert (await fuse.hosts.get("h2")).state == "cordoned"
        await fuse.hosts.uncordon("h2")
        made = await fuse.environments.create("t1", host_id="h2")
        with pytest.raises(HostInUse):
            await fuse.hosts.delete("h2")
        await fuse.hosts.drain("h2")
        assert (await fuse.hosts.get("h2")).state == "draining"
        assert (await fuse.environments.get(made.id)).state == "draining"
        await fuse.environments.delete(made.id)
        await fuse.hosts.delete("h2")
        with pytest.raises(HostNotFound):
            await fuse.hosts.delete("h2")
        assert [one.id async for one in fuse.hosts.list()] == ["h1"]
    with pytest.raises(HostUnreachable):
        await fuse.hosts.register("h3", "http://127.0.0.1:1")


async def test_keys_are_made_used_and_revoked(server: Running, fuse: AsyncFuse) -> None:
    made = await fuse.api_keys.create("CI", tenant="acme", scopes=["environments:read"], expires_in_seconds=3600)
    assert [(one.id, one.label, one.tenant) for one in await fuse.api_keys.list()] == [(made.id, "CI", "acme")]
    async with AsyncFuse(server.url, made.key) as theirs:
        assert [one async for one in theirs.environments.list()] == []
        with pytest.raises(ScopeMissing):
            await theirs.environments.begin("t1")
    await fuse.api_keys.revoke(made.id)
    with pytest.raises(KeyNotFound):
        await fuse.api_keys.revoke("ak_none")


async def test_the_synchronous_face_does_the_same(server: Running) -> None:
    def work() -> None:
        with Fuse(server.url, TOKEN) as fuse:
            made = fuse.environments.create("t1", **EVERYTHING)
            assert b"".join(fuse.environments.logs(made.id, source="startup")) == b"fake: echo ready\n"
            assert fuse.environments.rotate_token(made.id) is True
            taken = fuse.snapshots.create(made.id, metadata={"name": "base"})
            begun = fuse.snapshots.begin(made.id)
            assert [one.id for one in fuse.snapshots.list(uid=made.uid)] == [begun.id, taken.id]
            assert fuse.snapshots.get(taken.id).name == "base"
            assert fuse.snapshots.resolve("none", "amd64").found is False
            while fuse.snapshots.get(begun.id).state == "creating":
                pass
            fuse.snapshots.restore(taken.id)
            fuse.snapshots.delete(taken.id)
            fuse.snapshots.delete(begun.id, wait=False)
            with pytest.raises(SnapshotNotFound):
                fuse.snapshots.delete(taken.id)
            assert fuse.environments.drain(made.id).state == "draining"
            fuse.environments.delete(made.id)
            declared = CapacityInput(cpus=1, ram_mb=512, storage_gb=10, vm_count=1)
            assert fuse.hosts.register("h3", "http://127.0.0.1:1", capacity=declared).warnings
            fuse.hosts.cordon("h3")
            fuse.hosts.uncordon("h3")
            fuse.hosts.drain("h3")
            assert {one.id: one.state for one in fuse.hosts.list()} == {"h1": "active", "h3": "draining"}
            fuse.hosts.delete("h3")
            key = fuse.api_keys.create("CI")
            assert [one.id for one in fuse.api_keys.list()] == [key.id]
            fuse.api_keys.revoke(key.id)

    await asyncio.to_thread(work)


def test_a_snapshot_that_came_to_nothing_is_an_error() -> None:
    body = {"id": "s", "vm_id": "v", "uid": "u", "kind": "disk", "created_at": "", "updated_at": ""}
    raise_unless_whole(SnapshotBody(state="ready", **body))
    with pytest.raises(SnapshotFailed, match="no space"):
        raise_unless_whole(SnapshotBody(state="error", last_error="no space", **body))


def test_waiting_ends_with_its_limit() -> None:
    assert next(looks("the start", 60)) == 0.05
    with pytest.raises(Timeout, match="the start"):
        next(looks("the start", -1))
