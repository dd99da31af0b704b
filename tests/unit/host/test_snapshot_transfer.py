"""Snapshots that are carried away and back: artifacts, uploads, fetches."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from file_server import ok, serving
from snapshot_daemon import LOOPBACK, bytes_of, durable, make, serving_daemon, take_with

from fusevm.host.disk.qcow2 import CLUSTER, MAX_BYTES, Run, render_head
from fusevm.model.errors import (
    NoSpace,
)
from fusevm.testing.host_world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# -- carrying away and back ------------------------------------------------------------------------------------------


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
