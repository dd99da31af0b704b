"""Snapshots of a daemon with a fake VMM: real journal, real bytes, small disks."""

import asyncio
import contextlib
import hashlib
import json
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent / "images"))

from file_server import FileServer, ok, serving

from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.daemon import Daemon
from fusevm.host.disk.qcow2 import CLUSTER, MAX_BYTES, Run, render_head
from fusevm.host.fencing import LOCAL
from fusevm.host.images.addresses import parse_networks
from fusevm.host.images.collect import users_in_journal
from fusevm.host.images.fetch import FetchPolicy
from fusevm.host.removal import remove_tree
from fusevm.host.snapshots import folders
from fusevm.host.snapshots.folders import SnapshotFolders
from fusevm.host.snapshots.ledger import Ledger
from fusevm.host.snapshots.record import HostSnapshot, SnapshotPhase
from fusevm.model.errors import (
    GuestUnreachable,
    HostFull,
    MachineNotFound,
    NoSpace,
    NotSupported,
    SnapshotFailed,
    SnapshotNotFound,
    SnapshotNotReady,
    StaleIncarnation,
    WrongCluster,
    WrongState,
)
from fusevm.model.machine import Phase
from fusevm.testing.fake_disks import SIZE
from fusevm.testing.host_world import SPEC, KnownPoints, World, fence, order, until
from fusevm.wire.host_api import CLUSTER_HEADER
from fusevm.wire.host_snapshots import DurableSnapshot

LOOPBACK = FetchPolicy(allowed=parse_networks(["127.0.0.0/8"]), max_bytes=1 << 26, reserve_bytes=4096)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@asynccontextmanager
async def serving_daemon(world: World) -> AsyncIterator[tuple[Daemon, httpx.AsyncClient]]:
    async with world.daemon() as daemon:
        app = Boundary(make_router(daemon), daemon.metrics, secret=None)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as http:
            yield daemon, http


async def make(daemon: Daemon, machine_id: str = "m-1") -> None:
    """A machine of nobody's cluster, as computer-host's users have."""
    await daemon.machines.create(order(machine_id), None)


def hold_agent(world: World) -> asyncio.Event:
    """From now on whoever speaks to an agent waits."""
    world.driver.holds.reached("agent").clear()
    return world.driver.holds.hold("agent")


def bytes_of(world: World) -> set[str]:
    return {entry.name for entry in (world.root / "data" / "snapshots").iterdir()}


# -- taking ----------------------------------------------------------------------------------------------------------


async def test_the_answer_is_the_contracts(world: World) -> None:
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        world.disks.write("m-1", b"content")
        answer = await http.post("/machines/m-1/snapshots", json={"snapshot_id": "s-1"})
        assert answer.status_code == 201
        body = answer.json()
        (artifact,) = body["artifacts"]
        assert (artifact["id"], artifact["kind"]) == ("disk-system", "disk")
        assert {"id", "machine_id", "created_at"} <= body["snapshot"].keys()
        assert body["snapshot"]["consistency"] == "frozen"
        shown = (await http.get("/snapshots/s-1")).json()
        assert shown["snapshot"] == body["snapshot"]
        for url in ("/machines/m-1/snapshots", "/snapshots"):
            assert (await http.get(url)).json() == {"snapshots": [body["snapshot"]]}
        assert (await http.get("/machines/m-2/snapshots")).status_code == 404
        assert (await http.delete("/snapshots/s-1")).status_code == 204
        assert (await http.get("/snapshots/s-1")).status_code == 404
        assert bytes_of(world) == set()


@pytest.mark.parametrize("bad", ["..", ".", "", "a/b", "../m-1", "A", "a_b", "x" * 64, "%2e%2e"])
async def test_an_id_that_could_be_a_path_is_refused(world: World, bad: str) -> None:
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        answers = [
            await http.post("/machines/m-1/snapshots", json={"snapshot_id": bad}),
            await http.post("/machines/m-1/restore", json={"snapshot_id": bad}),
            await http.delete(f"/snapshots/{bad}"),
            await http.get(f"/snapshots/{bad}/artifacts/disk-system"),
            await http.post(f"/snapshots/{bad}/restore", json={"machine_id": "m-2", "local_snapshot": {}}),
        ]
        assert all(answer.status_code in (307, 400, 404, 405) for answer in answers)
        assert answers[0].json()["details"]["reason"] == "bad_field"
        assert bytes_of(world) == set()


async def test_an_id_of_another_machine_is_a_conflict(world: World) -> None:
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        await make(daemon, "m-2")
        body = {"snapshot_id": "s-1"}
        assert (await http.post("/machines/m-1/snapshots", json=body)).status_code == 201
        assert (await http.post("/machines/m-1/snapshots", json=body)).status_code == 201
        again = await http.post("/machines/m-2/snapshots", json=body)
        assert (again.status_code, again.json()["details"]["reason"]) == (409, "snapshot_exists")


async def test_a_running_guest_is_held_still_only_for_the_copy(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        agent = world.driver.processes["m-1"].agent
        taken = await daemon.snapshots.take("m-1", "s-1", None, live=False)
        said = [line for line in agent.requests if line in ("POST /quiesce", "POST /thaw")]
        assert said == ["POST /quiesce", "POST /thaw"]
        assert (taken.consistency.value, taken.agent_version, agent.is_frozen) == ("frozen", "fake", False)


async def test_a_stopped_machine_needs_no_guest(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        await daemon.machines.stop("m-1", None)
        assert (await daemon.snapshots.take("m-1", "s-1", None, live=False)).consistency.value == "stopped"


async def test_a_guest_that_went_on_writing_gives_no_snapshot(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        world.driver.processes["m-1"].agent.freeze_expires = True
        with pytest.raises(SnapshotFailed, match="went on writing"):
            await daemon.snapshots.take("m-1", "s-1", None, live=False)
        assert (await daemon.snapshots.load_all(), bytes_of(world)) == ([], set())
        world.driver.processes["m-1"].agent.freeze_expires = False
        await daemon.snapshots.take("m-1", "s-1", None, live=False)


async def test_an_order_that_comes_as_the_machine_goes_is_answered(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        deleting = asyncio.create_task(daemon.machines.delete("m-1", None))
        taking = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))
        await deleting
        with pytest.raises((MachineNotFound, StaleIncarnation)):
            await taking


async def test_what_cannot_be_taken_is_said(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        agent = world.driver.processes["m-1"].agent
        agent.cannot_freeze = True
        with pytest.raises(NotSupported, match="stop it first"):
            await daemon.snapshots.take("m-1", "s-1", None, live=False)
        agent.cannot_freeze = False
        with pytest.raises(NotSupported, match="memory"):
            await daemon.snapshots.take("m-1", "s-1", None, live=True)
        world.quarters.limits_now = msgspec.structs.replace(world.quarters.limits_now, disk_free_bytes=1 << 30)
        with pytest.raises(HostFull, match="disk"):
            await daemon.snapshots.take("m-1", "s-1", None, live=False)
        world.driver.processes["m-1"].end("killed by signal 9")
        await until(lambda: daemon.machines.record("m-1").phase is Phase.FAILED)
        with pytest.raises(WrongState):
            await daemon.snapshots.take("m-1", "s-1", None, live=False)
        assert bytes_of(world) == set()


async def test_a_machine_that_ends_meanwhile_gives_no_snapshot(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        held = hold_agent(world)
        taking = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))
        await world.driver.holds.reached("agent").wait()
        world.driver.processes["m-1"].end("killed by signal 9")
        held.set()
        with pytest.raises((GuestUnreachable, SnapshotFailed, ConnectionError, Exception)):
            await taking
        await until(lambda: daemon.machines.record("m-1").phase is Phase.FAILED)
        assert bytes_of(world) == set()


async def test_a_client_that_leaves_changes_nothing(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        held = hold_agent(world)
        taking = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))
        await until(lambda: world.driver.holds.reached("agent").is_set())
        taking.cancel()
        held.set()
        assert (await daemon.snapshots.take("m-1", "s-1", None, live=False)).phase.value == "ready"
        assert not world.driver.processes["m-1"].agent.is_frozen


async def test_a_delete_of_the_machine_overtakes(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        hold_agent(world)
        taking = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))
        await until(lambda: world.driver.holds.reached("agent").is_set())
        await daemon.machines.delete("m-1", None)
        with pytest.raises(StaleIncarnation):
            await taking
        assert (await daemon.snapshots.load_all(), bytes_of(world)) == ([], set())


# -- using -----------------------------------------------------------------------------------------------------------


async def test_the_disk_is_that_of_the_moment(world: World) -> None:
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        world.disks.write("m-1", b"before")
        await daemon.snapshots.take("m-1", "s-1", fence(), live=False)
        world.disks.write("m-1", b"after")
        await daemon.machines.create(order("m-2", snapshot_id="s-1"), fence("u2"))
        assert world.disks.read("m-2") == b"before"
        await daemon.machines.restore("m-1", "s-1", fence(action_seq=2))
        assert world.disks.read("m-1") == b"before"
        world.disks.write("m-1", b"later")
        await daemon.machines.restore("m-1", "s-1", fence(action_seq=2))  # the same order, asked again
        assert world.disks.read("m-1") == b"later"


async def test_a_disk_that_would_take_what_must_stay_free_is_not_begun(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        before = daemon.machines.record("m-1")
        limits = world.quarters.limits_now
        # Enough for a machine that begins with nothing, and for one that runs.
        free = limits.disk_reserve_bytes + SIZE // 2
        world.quarters.limits_now = msgspec.structs.replace(limits, disk_free_bytes=free)
        with pytest.raises(HostFull, match="disk"):
            await daemon.machines.create(order("m-2", snapshot_id="s-1"), None)
        with pytest.raises(HostFull, match="disk"):
            await daemon.machines.restore("m-1", "s-1", None)
        assert daemon.machines.ids() == {"m-1"}
        assert daemon.machines.record("m-1") == before
        assert not world.disks.is_staged("m-1")
        await make(daemon, "m-3")


async def test_a_snapshot_that_does_not_fit_is_a_conflict(world: World) -> None:
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        spec = SPEC.__class__(image="other", memory_mib=256, disk_bytes=1 << 30)
        await daemon.machines.create(order("m-2", spec), None)
        answer = await http.post("/machines/m-2/restore", json={"snapshot_id": "s-1"})
        assert (answer.status_code, answer.json()["details"]["reason"]) == (409, "snapshot_mismatch")
        body = {"machine_id": "m-3", "local_snapshot": {"snapshot_id": "s-1"}, "storage_bytes": 4096}
        answer = await http.post("/snapshots/s-1/restore", json=body)
        assert (answer.status_code, answer.json()["details"]["reason"]) == (409, "snapshot_mismatch")


async def test_snapshots_belong_to_a_cluster(world: World) -> None:
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await daemon.snapshots.take("m-1", "s-1", fence(), live=False)
        with pytest.raises(WrongCluster):
            await daemon.machines.create(order("m-2", snapshot_id="s-1"), None)
        with pytest.raises(WrongCluster):
            await daemon.snapshots.delete("s-1", "")
        assert bytes_of(world) == {"s-1"}


async def test_the_bytes_of_a_snapshot_are_for_its_cluster(world: World) -> None:
    url = "/snapshots/s-1/artifacts/disk-system"
    async with serving_daemon(world) as (daemon, http):
        await daemon.machines.create(order(), fence())
        await daemon.snapshots.take("m-1", "s-1", fence(), live=False)
        for headers in ({}, {CLUSTER_HEADER: "another"}):
            refused = await http.get(url, headers=headers)
            assert (refused.status_code, refused.json()["details"]["reason"]) == (409, "wrong_cluster")
        assert (await http.get(url, headers={CLUSTER_HEADER: fence().cluster})).status_code == 200


async def test_a_snapshot_keeps_its_image(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        await daemon.machines.delete("m-1", None)
        assert await users_in_journal(daemon.journal) == {"sha256:debian-12": ["snapshot s-1"]}


async def test_a_delete_while_it_is_made_usable_wins(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        taking = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))

        async def is_begun() -> bool:
            return bool(await daemon.snapshots.load_all())

        while not await is_begun():
            await asyncio.sleep(0)
        await daemon.snapshots.delete("s-1", "")
        await asyncio.wait({taking})
        assert not taking.cancelled()
        assert taking.exception() is not None
        assert (await daemon.snapshots.load_all(), bytes_of(world)) == ([], set())
        assert daemon.machines.record("m-1").phase is Phase.RUNNING


async def test_the_machine_is_free_before_the_digest_is_known(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        taken = await daemon.machines.take_snapshot("m-1", "s-1", None)
        assert (taken.phase.value, taken.artifacts) == ("sealing", ())
        assert await daemon.journal.operation("m-1") is None
        await daemon.machines.stop("m-1", None)
        sealed = await daemon.snapshots.seal(taken)
        assert sealed.phase.value == "ready"
        assert await daemon.snapshots.seal(taken) == sealed, "whoever comes second gets the same"


async def test_a_local_restore_is_the_contracts(world: World) -> None:
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        world.disks.write("m-1", b"content")
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        body = {"machine_id": "m-2", "local_snapshot": {"snapshot_id": "s-1"}, "storage_bytes": 1 << 30}
        answer = await http.post("/snapshots/s-1/restore", json=body)
        assert answer.status_code == 201, answer.text
        machine = answer.json()["machine"]
        assert (machine["id"], machine["phase"]) == ("m-2", "running")
        assert world.disks.read("m-2") == b"content"
        assert (await http.post("/snapshots/s-1/restore", json=body)).status_code == 409
        other = {**body, "machine_id": "m-3", "local_snapshot": {"snapshot_id": "s-9"}}
        assert (await http.post("/snapshots/s-1/restore", json=other)).status_code == 400
        assert (await http.post("/snapshots/s-1/restore", json={"machine_id": "m-3"})).status_code == 400


async def test_a_missing_local_snapshot_is_told_by_its_first_words(world: World) -> None:
    async with serving_daemon(world) as (_, http):
        answer = await http.post("/snapshots/s-1/restore", json={"machine_id": "m-1", "local_snapshot": {}})
        assert (answer.status_code, answer.json()["details"]["reason"]) == (404, "local_snapshot_missing")
        assert answer.json()["error"].startswith("local snapshot restore unavailable")


# -- carrying away and back ------------------------------------------------------------------------------------------


async def take_with(world: World, daemon: Daemon, content: bytes) -> dict[str, object]:
    await make(daemon)
    world.disks.write("m-1", content)
    taken = await daemon.snapshots.take("m-1", "s-1", None, live=False)
    (artifact,) = taken.artifacts
    return {"size_bytes": artifact.size_bytes, "sha256": artifact.sha256}


async def test_an_artifact_is_served_whole_and_in_ranges(world: World) -> None:
    async with serving_daemon(world) as (daemon, http):
        known = await take_with(world, daemon, b"content")
        url = "/snapshots/s-1/artifacts/disk-system"
        whole = await http.get(url)
        assert whole.status_code == 200
        assert len(whole.content) == known["size_bytes"]
        assert hashlib.sha256(whole.content).hexdigest() == known["sha256"]
        assert "attachment" in whole.headers["content-disposition"]
        for text, wanted in (("bytes=10-99", whole.content[10:100]), ("bytes=-7", whole.content[-7:])):
            part = await http.get(url, headers={"range": text})
            assert (part.status_code, part.content) == (206, wanted)
        beyond = await http.get(url, headers={"range": f"bytes={known['size_bytes']}-"})
        assert beyond.status_code == 400
        missing = await http.get("/snapshots/s-1/artifacts/disk-user-1")
        assert (missing.status_code, missing.json()["details"]["reason"]) == (404, "artifact_not_found")


class Store:
    """An object store that keeps what is PUT, and may be told to fail."""

    def __init__(self) -> None:
        self.parts: dict[str, bytes] = {}
        self.failures: list[bytes] = []
        self.tries = 0
        self.etag = '"e"'


@asynccontextmanager
async def storing(store: Store) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(
            next(line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length"))
        )
        content = await reader.readexactly(length)
        store.tries += 1
        if store.failures:
            writer.write(store.failures.pop(0))
        else:
            store.parts[head.split(" ")[1]] = content
            writer.write(ok(b"", *([f"ETag: {store.etag}"] if store.etag else [])))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


def parts_of(size: int, port: int) -> list[dict[str, object]]:
    half = size // 2
    bounds = ((1, 0, half), (2, half, size - half))
    return [
        {"part_number": n, "offset_bytes": at, "size_bytes": count, "upload_url": f"http://127.0.0.1:{port}/p{n}?sig=x"}
        for n, at, count in bounds
    ]


async def test_a_snapshot_goes_to_a_store_in_parts_and_comes_back(world: World, tmp_path: Path) -> None:
    world.policy = LOOPBACK
    store = Store()
    store.failures = [ok(b"", status="503 Slow Down")]
    async with serving_daemon(world) as (daemon, http), storing(store) as port:
        known = await take_with(world, daemon, b"content")
        size = int(str(known["size_bytes"]))
        upload = {"artifact_id": "disk-system", "object_key": "k", "upload_id": "u", "parts": parts_of(size, port)}
        answer = await http.post("/snapshots/s-1/upload", json={"artifacts": [upload]})
        assert answer.status_code == 200, answer.text
        (done,) = answer.json()["artifacts"]
        assert done["completed_parts"] == [{"part_number": 1, "etag": '"e"'}, {"part_number": 2, "etag": '"e"'}]
        assert store.tries == 3
    packed = store.parts["/p1?sig=x"] + store.parts["/p2?sig=x"]
    assert hashlib.sha256(packed).hexdigest() == known["sha256"]

    other = World(tmp_path / "other")
    other.policy = LOOPBACK
    async with serving(lambda _target, _headers: ok(packed)) as files, serving_daemon(other) as (_, http):
        body = durable(files, known, machine_id="m-9")
        answer = await http.post("/snapshots/s-1/restore", json=body)
        assert answer.status_code == 201, answer.text
        assert other.disks.read("m-9") == b"content"
        assert (await http.get("/snapshots/s-1")).json()["snapshot"]["state"] == "ready"
        # What was fetched is a snapshot of this host from now on.
        answer = await http.post("/snapshots/s-1/restore", json={**body, "machine_id": "m-10"})
        assert (answer.status_code, len(files.requests)) == (201, 1)


def durable(
    files: FileServer, known: dict[str, object], machine_id: str = "m-9", **changes: object
) -> dict[str, object]:
    artifact = {
        "id": "disk-system",
        "kind": "disk",
        "name": "../../../etc/cron.d/evil",
        "size_bytes": known["size_bytes"],
        "sha256_hex": known["sha256"],
        "download_url": files.url("/disk"),
        **changes,
    }
    snapshot = {"snapshot_id": "s-1", "machine_id": "m-1", "image_id": "sha256:debian-12", "artifacts": [artifact]}
    return {"machine_id": machine_id, "storage_bytes": 1 << 30, "snapshot": snapshot}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sha256_hex": "0" * 64}, "digest_mismatch"),
        ({"size_bytes": 1 << 40}, "bad_field"),
        ({"size_bytes": 10}, "image_too_large"),
        ({"download_url": "file:///etc/shadow"}, "artifact_refused"),
        ({"download_url": "http://169.254.169.254/latest"}, "address_refused"),
        ({"download_url": ""}, "bad_field"),
        ({"id": "../../x"}, "bad_field"),
        ({"kind": "memory"}, "bad_field"),
    ],
)
async def test_what_is_fetched_is_checked_and_leaves_nothing(
    world: World, changes: dict[str, object], reason: str
) -> None:
    world.policy = LOOPBACK
    content = b"no disk" * 100
    known = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    async with serving(lambda _target, _headers: ok(content)) as files, serving_daemon(world) as (daemon, http):
        answer = await http.post("/snapshots/s-1/restore", json=durable(files, known, **changes))
        assert answer.json()["details"]["reason"] == reason, answer.text
        assert (await daemon.snapshots.load_all(), bytes_of(world), daemon.machines.records()) == ([], set(), [])


async def test_what_was_fetched_must_be_a_disk(world: World) -> None:
    world.policy = LOOPBACK
    content = b"no disk" * 100
    known = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    async with serving(lambda _target, _headers: ok(content)) as files, serving_daemon(world) as (_, http):
        answer = await http.post("/snapshots/s-1/restore", json=durable(files, known))
        assert (answer.status_code, answer.json()["details"]["reason"]) == (500, "snapshot_failed")
        assert bytes_of(world) == set()


def packed_disk(size: int, *clusters: bytes) -> bytes:
    return render_head(size, [Run(0, len(clusters))]) + b"".join(clusters)


async def restored(http: httpx.AsyncClient, content: bytes) -> httpx.Response:
    """The answer to a request for a machine that begins with these bytes."""
    known = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    async with serving(lambda _target, _headers: ok(content)) as files:
        return await http.post("/snapshots/s-1/restore", json=durable(files, known))


async def test_a_fetched_disk_is_not_larger_than_all_that_machines_may_have(world: World) -> None:
    world.policy = LOOPBACK
    async with serving_daemon(world) as (_, http):
        answer = await restored(http, packed_disk(MAX_BYTES, bytes([1]) * CLUSTER))
        assert answer.json()["details"]["reason"] == "snapshot_failed"
        assert "this host has" in answer.json()["error"]
        assert bytes_of(world) == set()


async def test_a_fetched_disk_leaves_the_host_its_reserve(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.policy = LOOPBACK
    asked = []

    def full(folder: Path, needed_bytes: int) -> None:
        asked.append(needed_bytes)
        if len(asked) > 2:
            raise NoSpace(path=str(folder), needed=needed_bytes, free=0)

    monkeypatch.setattr("fusevm.host.snapshots.transfer.ensure_free", full)
    async with serving_daemon(world) as (_, http):
        answer = await restored(http, packed_disk(1 << 26, *[bytes([1]) * CLUSTER] * 64))
        assert answer.json()["details"]["reason"] == "no_space"
        assert asked == [LOOPBACK.reserve_bytes] * 3
        assert bytes_of(world) == set()


async def test_an_upload_says_what_the_store_would_not_take(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusevm.host.snapshots.transfer._FIRST_PAUSE_S", 0.001)
    world.policy = LOOPBACK
    store = Store()
    async with serving_daemon(world) as (daemon, http), storing(store) as port:
        known = await take_with(world, daemon, b"content")
        parts = parts_of(int(str(known["size_bytes"])), port)

        async def upload(*wanted: dict[str, object]) -> tuple[int, str]:
            body = {"artifacts": [{"artifact_id": "disk-system", "parts": list(wanted)}]}
            answer = await http.post("/snapshots/s-1/upload", json=body)
            return answer.status_code, answer.json()["details"]["reason"]

        store.failures = [ok(b"", status="403 Forbidden")]
        assert await upload(*parts) == (503, "upload_failed")
        assert store.tries == 1
        store.etag = ""
        assert await upload(*parts) == (503, "upload_failed")
        store.failures = [ok(b"", status="500 Oops")] * 9
        assert await upload(*parts) == (503, "upload_failed")
        assert store.tries == 6
        assert await upload({**parts[0], "offset_bytes": -1}) == (400, "bad_field")
        assert await upload({**parts[0], "size_bytes": 1 << 40}) == (400, "bad_field")
        assert await upload(parts[0], parts[0]) == (400, "bad_field")
        assert await upload() == (400, "bad_field")
        assert await upload({**parts[0], "upload_url": "http://10.0.0.1/x"}) == (400, "address_refused")
        unknown = {"artifacts": [{"artifact_id": "disk-user-1", "parts": parts}]}
        assert (await http.post("/snapshots/s-1/upload", json=unknown)).status_code == 404


async def test_the_manifest_says_what_was_taken(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        taken = await daemon.snapshots.take("m-1", "s-1", None, live=False)
        manifest = json.loads((world.root / "data" / "snapshots" / "s-1" / "manifest.json").read_text())
        assert (manifest["id"], manifest["machine_id"], manifest["image_digest"]) == ("s-1", "m-1", "sha256:debian-12")
        assert manifest["artifacts"][0]["sha256"] == taken.artifacts[0].sha256
        assert (manifest["driver"], manifest["agent_version"]) == ("fake", "fake")


async def test_folders_of_nobody_are_removed(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        (world.root / "data" / "snapshots" / "stray").mkdir()
        await daemon.snapshots.tidy()
        assert bytes_of(world) == {"s-1"}
        assert b'fuse_host_leftovers_removed_total{kind="snapshot"} 1.0' in daemon.metrics.render()


async def test_the_storage_report_counts_snapshots(world: World) -> None:
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        world.disks.write("m-1", b"content")
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        report = (await http.get("/storage/report")).json()["report"]
        (snapshot,) = report["snapshots"]
        pools = {pool["pool"]: pool["bytes"] for pool in report["pools"]}
        assert snapshot["snapshot_id"] == "s-1"
        assert 0 < snapshot["bytes"] == pools["snapshots"] < 1 << 20, "allocated blocks, not the size of the disk"


# -- several at once -------------------------------------------------------------------------------------------------


class Counting(KnownPoints):
    """Counts the points that were reached."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def reached(self, point: str) -> None:
        super().reached(point)
        self.seen.append(point)


class HeldRemoval:
    """Folders are removed when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.may_go = threading.Event(), threading.Event()

        def remove(path: Path) -> None:
            self.reached.set()
            self.may_go.wait()
            remove_tree(path)

        monkeypatch.setattr("fusevm.host.snapshots.folders.remove_tree", remove)


async def test_two_who_delete_a_snapshot_both_hear_that_it_is_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fault = points = Counting()
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        removal = HeldRemoval(monkeypatch)
        first = asyncio.create_task(http.delete("/snapshots/s-1"))
        await until(removal.reached.is_set)
        second = asyncio.create_task(http.delete("/snapshots/s-1"))
        await until(lambda: points.seen.count("unsnapshot.intent") == 2)
        removal.may_go.set()
        assert [(await answer).status_code for answer in (first, second)] == [204, 204]
        assert (await daemon.snapshots.load_all(), bytes_of(world)) == ([], set())


async def test_what_is_deleted_before_it_is_usable_is_not_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        taken = await daemon.machines.take_snapshot("m-1", "s-1", None)
        removal = HeldRemoval(monkeypatch)
        deleting = asyncio.create_task(daemon.snapshots.delete("s-1", ""))
        await until(removal.reached.is_set)
        sealing = asyncio.create_task(daemon.snapshots.seal(taken))
        await asyncio.sleep(0)
        removal.may_go.set()
        with pytest.raises(SnapshotNotFound):
            await sealing
        await deleting
        assert (await daemon.snapshots.load_all(), bytes_of(world)) == ([], set())


async def test_a_taker_hears_of_the_delete_that_came_between(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        agent = hold_agent(world)
        copying = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))
        await until(lambda: world.driver.holds.reached("agent").is_set())
        await daemon.snapshots.delete("s-1", "")
        agent.set()
        with pytest.raises(SnapshotNotFound):
            await copying

        is_sealing = asyncio.Event()

        async def seal(_folders: SnapshotFolders, _snapshot: HostSnapshot) -> HostSnapshot:
            is_sealing.set()
            return await asyncio.Future()

        monkeypatch.setattr(SnapshotFolders, "seal", seal)
        sealing = asyncio.create_task(daemon.snapshots.take("m-1", "s-2", None, live=False))
        await until(is_sealing.is_set)
        await daemon.snapshots.delete("s-2", "")
        with pytest.raises(SnapshotNotFound):
            await sealing
        assert (await daemon.snapshots.load_all(), bytes_of(world), daemon.machines.quarantined()) == ([], set(), {})


async def test_a_fetch_leaves_alone_what_is_taken_under_its_id(world: World) -> None:
    world.policy = LOOPBACK
    async with serving(lambda _target, _headers: ok(b"")) as files, world.daemon() as daemon:
        await make(daemon)
        wanted = durable(files, {"size_bytes": 1, "sha256": ""})["snapshot"]
        agent = hold_agent(world)
        taking = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))
        await until(lambda: world.driver.holds.reached("agent").is_set())
        with pytest.raises(SnapshotNotReady):
            await daemon.snapshots.fetch("s-1", msgspec.convert(wanted, DurableSnapshot), "sha256:debian-12")
        agent.set()
        assert (await taking).phase.value == "ready"
        assert files.requests == []


async def test_a_fetch_waits_for_the_removal_of_what_an_earlier_one_has_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.policy = LOOPBACK
    async with world.daemon() as daemon:
        known = await take_with(world, daemon, b"content")
        packed = daemon.snapshots.open_packed(await daemon.snapshots.get("s-1"))
        content = packed.read(0, packed.size)
        packed.close()
        await daemon.snapshots.delete("s-1", "")
        async with serving(lambda _target, _headers: ok(content)) as files:
            body = msgspec.convert(durable(files, known)["snapshot"], DurableSnapshot)
            left = HostSnapshot(
                id="s-1",
                cluster=LOCAL,
                machine_id="m-1",
                phase=SnapshotPhase.TAKING,
                image_digest="sha256:debian-12",
                disk_bytes=0,
                source=files.url("/disk"),
                created_at_ms=1,
            )
            ledger = Ledger(daemon.journal, lambda: 1)
            await ledger.begin_import(left, await world.quarters.limits(), 1)
            assert await ledger.taking("m-1") == [], "it is none of the machine's here"
            removal = HeldRemoval(monkeypatch)
            await daemon.snapshots.tidy()
            await until(removal.reached.is_set)
            fetching = asyncio.create_task(daemon.snapshots.fetch("s-1", body, "sha256:debian-12"))
            await asyncio.sleep(0)
            removal.may_go.set()
            assert (await fetching).phase is SnapshotPhase.READY
        await daemon.machines.create(order("m-2", snapshot_id="s-1"), None)
        assert world.disks.read("m-2") == b"content"


# -- damage ----------------------------------------------------------------------------------------------------------


def damage(world: World, change: str = "record = x'00'") -> None:
    with contextlib.closing(sqlite3.connect(world.root / "data/journal.db", isolation_level=None)) as db:
        db.execute(f"UPDATE snapshots SET {change} WHERE id = 's-1'")


def is_swept(daemon: Daemon) -> bool:
    """Has the metric heard of a sweep?"""
    lines = daemon.metrics.render().decode().splitlines()
    return any(float(line.split()[-1]) > 0 for line in lines if line.startswith("fuse_host_sweep_seconds "))


async def test_a_record_that_cannot_be_read_costs_neither_the_start_nor_the_others_anything(world: World):
    async with world.daemon() as daemon:
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        await daemon.snapshots.take("m-1", "s-2", None, live=False)
    damage(world)
    async with serving_daemon(world) as (daemon, http):
        listed = (await http.get("/snapshots")).json()["snapshots"]
        assert {one["id"]: one["state"] for one in listed} == {"s-1": "damaged", "s-2": "ready"}
        with pytest.raises(SnapshotNotReady, match="damaged"):
            await daemon.machines.restore("m-1", "s-1", None)
        assert (await daemon.machines.restore("m-1", "s-2", None)).phase is Phase.RUNNING
        assert is_swept(daemon)
        assert (await http.delete("/snapshots/s-1")).status_code == 204
        assert [one.id for one in await daemon.snapshots.load_all()] == ["s-2"]
    assert {folder.name for folder in (world.root / "data/snapshots").iterdir()} == {"s-2"}


@pytest.mark.parametrize("phase", ["taking", "deleting"])
async def test_a_damaged_record_of_what_was_not_complete_goes(world: World, phase: str):
    async with world.daemon() as daemon:
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
    damage(world, f"record = x'00', phase = '{phase}'")
    async with world.daemon():
        await until(lambda: not (world.root / "data/snapshots/s-1").exists())


async def test_a_folder_that_cannot_be_removed_costs_neither_the_start_nor_the_others_anything(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    async with world.daemon() as daemon:
        await make(daemon)
    root = world.root / "data/snapshots"
    for name in ("a", "stray", "z"):
        (root / name).mkdir()
    remove_tree = folders.remove_tree

    def remove(path: Path) -> None:
        if path.name == "stray":
            raise PermissionError(1, "Operation not permitted")
        remove_tree(path)

    monkeypatch.setattr(folders, "remove_tree", remove)
    async with world.daemon() as daemon:
        assert daemon.machines.record("m-1").phase is Phase.RUNNING
        assert {folder.name for folder in root.iterdir()} == {"stray"}
        assert (await daemon.snapshots.take("m-1", "s-1", None, live=False)).id == "s-1"


async def test_what_fails_in_a_sweep_keeps_nothing_else_from_being_swept(world: World, monkeypatch: pytest.MonkeyPatch):
    async with world.daemon() as daemon:
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
    tried: list[str] = []

    async def fail(what: str) -> None:
        tried.append(what)
        raise RuntimeError(what)

    monkeypatch.setattr("fusevm.host.snapshots.keeper.SnapshotKeeper.tidy", lambda _self: fail("tidy"))
    monkeypatch.setattr("fusevm.host.journal.Journal.purge", lambda _self: fail("purge"))
    monkeypatch.setattr("fusevm.host.image_service.ImageService.relieve", lambda _self: fail("relieve"))
    async with world.daemon() as daemon:
        assert tried == ["tidy", "purge", "relieve"]
        assert is_swept(daemon)
        assert daemon.machines.record("m-1").phase is Phase.RUNNING
