"""Snapshots on which several work at the same time, and damaged ones."""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from file_server import ok, serving
from snapshot_daemon import LOOPBACK, bytes_of, durable, hold_agent, make, serving_daemon, take_with

from fusevm.host.daemon import Daemon
from fusevm.host.fencing import LOCAL
from fusevm.host.removal import remove_tree
from fusevm.host.snapshots import folders
from fusevm.host.snapshots.folders import SnapshotFolders
from fusevm.host.snapshots.ledger import Ledger
from fusevm.host.snapshots.record import HostSnapshot, SnapshotPhase
from fusevm.model.errors import (
    SnapshotNotFound,
    SnapshotNotReady,
)
from fusevm.model.machine import Phase
from fusevm.testing.host_world import KnownPoints, World, order, until
from fusevm.wire.host_snapshots import DurableSnapshot


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


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


async def test_a_fetch_joins_no_fetch_of_other_content_under_its_id(world: World) -> None:
    world.policy = LOOPBACK
    async with world.daemon() as daemon:
        known = await take_with(world, daemon, b"content")
        packed = daemon.snapshots.open_packed(await daemon.snapshots.get("s-1"))
        content = packed.read(0, packed.size)
        packed.close()
        await daemon.snapshots.delete("s-1", "")
        may_answer = asyncio.Event()

        async def answer() -> AsyncIterator[bytes]:
            await may_answer.wait()
            yield ok(content)

        async with serving(lambda _target, _headers: answer()) as files:

            def fetch(image: str = "sha256:debian-12", **changes: object) -> asyncio.Task[HostSnapshot]:
                wanted = msgspec.convert(durable(files, known, **changes)["snapshot"], DurableSnapshot)
                return asyncio.create_task(daemon.snapshots.fetch("s-1", wanted, image))

            first = fetch()
            await until(lambda: len(files.requests) == 1)
            signed_anew = fetch(download_url=files.url("/disk?signature=2"))
            for other in (
                fetch(download_url=files.url("/other")),
                fetch(sha256_hex="0" * 64),
                fetch(image="sha256:alpine"),
            ):
                with pytest.raises(SnapshotNotReady):
                    await other
            may_answer.set()
            assert await first == await signed_anew
            assert files.requests == ["/disk"]


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


def damage(world: World, change: str) -> None:
    with contextlib.closing(sqlite3.connect(world.root / "data/journal.db", isolation_level=None)) as db:
        db.execute(f"UPDATE snapshots SET {change} WHERE id = 's-1'")


def is_swept(daemon: Daemon) -> bool:
    """Has the metric heard of a sweep?"""
    lines = daemon.metrics.render().decode().splitlines()
    return any(float(line.split()[-1]) > 0 for line in lines if line.startswith("fuse_host_sweep_seconds "))


@pytest.mark.parametrize("record", ["00", b'{"id":"\xff"}'.hex()], ids=["no JSON", "no UTF-8"])
async def test_a_record_that_cannot_be_read_costs_neither_the_start_nor_the_others_anything(world: World, record: str):
    async with world.daemon() as daemon:
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        await daemon.snapshots.take("m-1", "s-2", None, live=False)
    damage(world, f"record = x'{record}'")
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
