"""Snapshots over the API, against a host that only remembers them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from control_harness import Running, running, until

from fusevm.model.environment import Environment
from fusevm.model.errors import HostUnreachable, SnapshotFailed
from fusevm.model.event import Event, RestoreRequested
from fusevm.testing.fake_host import FakeHost

URL = "/v1/environments/fuse-t1/snapshots"


async def taken(server: Running, **body: object) -> dict[str, object]:
    answer = await server.http.post(URL, json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def _is_ended(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (404, "ended")


def before_a_restore(server: Running, meanwhile: Callable[[], Awaitable[object]]) -> None:
    """Let something happen between the reading of the snapshot and the order to restore it; once."""
    feed = server.plane.entry.feed

    async def overtaken(uid: str, event: Event, **rest: Any) -> Environment:
        if isinstance(event, RestoreRequested):
            server.plane.entry.feed = feed  # type: ignore[method-assign]
            await meanwhile()
        return await feed(uid, event, **rest)

    server.plane.entry.feed = overtaken  # type: ignore[method-assign]


async def test_a_snapshot_is_taken_shown_and_listed_newest_first() -> None:
    async with running() as server:
        await server.create()
        first = await taken(server, comment="before", metadata={"name": "base"}, retention_seconds=3600)
        second = await taken(server)
        assert (first["state"], first["kind"], first["name"], first["comment"]) == ("ready", "disk", "base", "before")
        assert first["size_bytes"] == 1 << 20
        assert first["retention_until"]
        assert second["parent_snapshot_id"] == first["id"]
        shown = await server.http.get(f"/v1/snapshots/{first['id']}")
        assert shown.json() == first
        page = (await server.http.get("/v1/snapshots", params={"vm_id": "fuse-t1", "limit": 1})).json()
        assert [one["id"] for one in page["snapshots"]] == [second["id"]]
        rest = (await server.http.get("/v1/snapshots", params={"cursor": page["next_cursor"]})).json()
        assert [one["id"] for one in rest["snapshots"]] == [first["id"]]
        assert "next_cursor" not in rest


@pytest.mark.parametrize("query", ["task_id=other", "state=error", "vm_id=fuse-x", "name=x", "mode=auto", "arch=arm64"])
async def test_filters_leave_out_what_does_not_fit(query: str) -> None:
    async with running() as server:
        await server.create()
        await taken(server)
        assert (await server.http.get(f"/v1/snapshots?{query}")).json() == {"snapshots": []}


async def test_an_unknown_state_is_refused() -> None:
    async with running() as server:
        answer = await server.http.get("/v1/snapshots?state=perfect")
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (400, "bad_field")


async def test_a_body_may_be_left_out() -> None:
    async with running() as server:
        await server.create()
        assert (await server.http.post(URL)).status_code == 201


async def test_a_host_without_snapshots_is_a_501_and_the_environment_goes_on() -> None:
    host = FakeHost("h1")
    host.has_snapshots = False
    async with running(host) as server:
        await server.create()
        answer = await server.http.post(URL, json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (501, "unimplemented")
        assert (await server.get()).json()["state"] == "running"
        (failed,) = (await server.http.get("/v1/snapshots")).json()["snapshots"]
        assert failed["state"] == "error"
        assert failed["last_error"]


async def test_a_host_that_is_silent_for_a_moment_is_asked_again() -> None:
    host = FakeHost("h1")
    async with running(host) as server:
        await server.create()
        host.script("take_snapshot", HostUnreachable(id="h1", problem="restarting"))
        assert (await taken(server))["state"] == "ready"


async def test_only_one_action_at_a_time() -> None:
    async with running() as server:
        await server.create()
        server.host.hold["take_snapshot"] = asyncio.Event()
        first = asyncio.create_task(server.http.post(URL, json={}))
        await until(lambda: server.host.count("take_snapshot"))
        again = await server.http.post(URL, json={})
        assert (again.status_code, again.json()["error"]["details"]["reason"]) == (409, "action_under_way")
        server.host.hold.pop("take_snapshot").set()
        assert (await first).status_code == 201


async def test_a_destroy_does_not_wait_for_a_snapshot() -> None:
    async with running() as server:
        await server.create()
        server.host.hold["take_snapshot"] = asyncio.Event()
        taking = asyncio.create_task(server.http.post(URL, json={}))
        await until(lambda: server.host.count("take_snapshot"))
        assert (await server.delete()).status_code == 204
        server.host.hold.pop("take_snapshot").set()
        _is_ended(await taking)
        (left,) = (await server.http.get("/v1/snapshots")).json()["snapshots"]
        assert left["state"] == "error"


async def test_a_restore_puts_the_same_machine_back_and_sets_it_up_again() -> None:
    async with running() as server:
        env = await server.create(startup_script="true", secrets={"A": "b"})
        snapshot = await taken(server)
        answer = await server.http.post(f"/v1/snapshots/{snapshot['id']}?action=restore")
        assert (answer.status_code, answer.content) == (204, b"")
        record = await server.record(env["uid"])
        guest = server.host.guests[record.machine_id]
        assert guest.setup is not None
        assert guest.processes == {}, "the startup script ran before the snapshot"
        assert (await server.http.get(f"/v1/snapshots/{snapshot['id']}")).json()["state"] == "ready"


async def test_a_snapshot_of_an_ended_environment_is_kept_but_not_restored_in_place() -> None:
    async with running() as server:
        await server.create()
        snapshot = await taken(server)
        await server.delete()
        answer = await server.http.post(f"/v1/snapshots/{snapshot['id']}?action=restore")
        assert answer.status_code == 404
        assert (await server.http.get(f"/v1/snapshots/{snapshot['id']}")).json()["state"] == "ready"


async def test_a_new_environment_starts_from_a_snapshot_on_its_host() -> None:
    hosts = [FakeHost("h1"), FakeHost("h2")]
    async with running(*hosts) as server:
        env = await server.create(spec={"host_id": "h2"})
        snapshot = await taken(server)
        seeded = await server.create("t2", seed_snapshot_id=snapshot["id"])
        assert seeded["host_id"] == "h2"
        assert seeded["spec"]["seed_snapshot_id"] == snapshot["id"]
        assert seeded["spec"]["image"] == env["spec"]["image"]
        order = [what[1] for name, what in hosts[1].calls if name == "create"][-1]
        assert order.snapshot_id == snapshot["id"]


@pytest.mark.parametrize(
    ("body", "status"),
    [({"seed_snapshot_id": "snap-none"}, 404), ({"seed_snapshot_id": "?", "spec": {"image": "x"}}, 400)],
)
async def test_a_seed_that_cannot_be_used_is_refused(body: dict[str, object], status: int) -> None:
    async with running() as server:
        await server.create()
        snapshot = await taken(server)
        if body["seed_snapshot_id"] == "?":
            body = {**body, "seed_snapshot_id": snapshot["id"]}
        answer = await server.http.post("/v1/environments", json={"task_id": "t2", **body})
        assert answer.status_code == status


async def test_a_snapshot_with_memory_is_restored_in_place_and_is_no_seed() -> None:
    async with running() as server:
        await server.create()
        snapshot = await taken(server, live=True)
        assert snapshot["kind"] == "live"
        answer = await server.http.post("/v1/environments", json={"task_id": "t2", "seed_snapshot_id": snapshot["id"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
        assert (await server.http.post(f"/v1/snapshots/{snapshot['id']}?action=restore")).status_code == 204


async def test_deletion_frees_the_bytes_before_the_record() -> None:
    async with running() as server:
        await server.create()
        snapshot = await taken(server)
        assert (await server.http.delete(f"/v1/snapshots/{snapshot['id']}")).status_code == 204
        assert server.host.snapshots == {}
        assert (await server.http.get(f"/v1/snapshots/{snapshot['id']}")).status_code == 404
        assert (await server.http.delete(f"/v1/snapshots/{snapshot['id']}")).status_code == 404


async def test_a_deletion_that_the_host_cannot_take_goes_on_by_itself() -> None:
    async with running(lease_s=0.3) as server:
        await server.create()
        snapshot = await taken(server)
        server.host.script("delete_snapshot", HostUnreachable(id="h1", problem="restarting"))
        assert (await server.http.delete(f"/v1/snapshots/{snapshot['id']}")).status_code == 202
        assert (await server.http.get(f"/v1/snapshots/{snapshot['id']}")).json()["state"] == "deleting"
        await until(lambda: server.host.snapshots == {})

        async def is_gone() -> bool:
            return (await server.http.get(f"/v1/snapshots/{snapshot['id']}")).status_code == 404

        await until(is_gone)


async def test_an_expired_snapshot_goes_but_not_the_newest() -> None:
    async with running() as server:
        await server.create()
        old = await taken(server, retention_seconds=1)
        new = await taken(server, retention_seconds=1)

        async def ids() -> list[str]:
            return [one["id"] for one in (await server.http.get("/v1/snapshots")).json()["snapshots"]]

        async def only_the_newest() -> bool:
            return await ids() == [new["id"]]

        await until(only_the_newest)
        assert old["id"] not in server.host.snapshots
        await taken(server)

        async def only_the_last() -> bool:
            return new["id"] not in await ids()

        await until(only_the_last)


async def test_a_layer_is_found_by_key_and_architecture_and_a_miss_is_no_error() -> None:
    async with running() as server:
        await server.create()
        layer = await taken(server, mode="build", layer_key="sha256:abc")
        url = "/v1/snapshots/resolve"
        hit = (await server.http.get(url, params={"layer_key": "sha256:abc", "arch": "amd64"})).json()
        assert (hit["found"], hit["snapshot"]["id"]) == (True, layer["id"])
        miss = await server.http.get(url, params={"layer_key": "sha256:abd", "arch": "amd64"})
        assert (miss.status_code, miss.json()) == (200, {"found": False})
        assert (await server.http.get(url)).status_code == 400


async def test_a_name_that_is_used_again_starts_with_a_fresh_disk() -> None:
    async with running() as server:
        await server.create()
        await taken(server)
        await server.delete()
        await server.create()
        assert [what[1].snapshot_id for name, what in server.host.calls if name == "create"] == ["", ""]
        assert server.host.count("restore_snapshot") == 0


async def test_what_begins_with_a_snapshot_is_no_snapshot_and_keeps_none_from_being_deleted() -> None:
    async with running() as server:
        await server.create()
        snapshot = await taken(server)
        await server.create("t2", seed_snapshot_id=snapshot["id"])
        listed = (await server.http.get("/v1/snapshots")).json()["snapshots"]
        assert [one["id"] for one in listed] == [snapshot["id"]]
        assert (await server.http.delete(f"/v1/snapshots/{snapshot['id']}")).status_code == 204
        assert (await server.get("t2")).json()["state"] == "running"


async def test_a_restore_that_the_host_refuses_leaves_snapshot_and_environment_as_they_were() -> None:
    async with running() as server:
        await server.create()
        snapshot = await taken(server)
        url = f"/v1/snapshots/{snapshot['id']}"
        server.host.script("restore_snapshot", SnapshotFailed(id=str(snapshot["id"]), problem="the disk is full"))
        refused = await server.http.post(url + "?action=restore")
        assert (refused.status_code, refused.json()["error"]["details"]["reason"]) == (500, "snapshot_failed")
        assert (await server.http.get(url)).json()["state"] == "ready"
        assert (await server.get()).json()["state"] == "running"
        assert (await server.http.post(url + "?action=restore")).status_code == 204


async def test_a_restore_that_a_destroy_comes_before_says_so() -> None:
    async with running() as server:
        await server.create()
        url = f"/v1/snapshots/{(await taken(server))['id']}"
        server.host.hold["restore_snapshot"] = asyncio.Event()
        restoring = asyncio.create_task(server.http.post(url + "?action=restore"))
        await until(lambda: server.host.count("restore_snapshot"))
        assert (await server.delete()).status_code == 204
        server.host.hold.pop("restore_snapshot").set()
        _is_ended(await restoring)
        assert (await server.http.get(url)).json()["state"] == "ready"


@pytest.mark.parametrize("is_gone", [False, True])
async def test_a_restore_that_a_deletion_comes_before_is_refused(is_gone: bool) -> None:
    async with running(wait_s=60.0 if is_gone else 0.05) as server:
        await server.create()
        url = f"/v1/snapshots/{(await taken(server))['id']}"
        held = asyncio.Event()
        if not is_gone:
            server.host.hold["delete_snapshot"] = held
        before_a_restore(server, lambda: server.http.delete(url))
        async with asyncio.timeout(10):
            refused = await server.http.post(url + "?action=restore")
        found = (404, "snapshot_not_found") if is_gone else (409, "snapshot_not_ready")
        assert (refused.status_code, refused.json()["error"]["details"]["reason"]) == found
        server.host.hold.clear()
        held.set()
        assert server.host.count("restore_snapshot") == 0
        assert (await server.get()).json()["state"] == "running"


@pytest.mark.parametrize("is_guarded", [False, True])
async def test_a_restore_after_another_one_is_made_unless_it_is_guarded(is_guarded: bool) -> None:
    async with running() as server:
        await server.create()
        url = f"/v1/snapshots/{(await taken(server))['id']}"
        headers = {"if-match": (await server.http.get(url)).headers["etag"]} if is_guarded else {}
        before_a_restore(server, lambda: server.http.post(url + "?action=restore"))
        async with asyncio.timeout(10):
            second = await server.http.post(url + "?action=restore", headers=headers)
        assert second.status_code == (412 if is_guarded else 204)
        assert server.host.count("restore_snapshot") == (1 if is_guarded else 2)


async def test_of_two_restores_at_the_same_time_one_is_made() -> None:
    async with running() as server:
        await server.create()
        url = f"/v1/snapshots/{(await taken(server))['id']}"
        etag = (await server.http.get(url)).headers["etag"]
        held = server.host.hold["restore_snapshot"] = asyncio.Event()
        first: list[asyncio.Task[httpx.Response]] = []

        async def begin_another() -> None:
            first.append(asyncio.create_task(server.http.post(url + "?action=restore")))
            await until(lambda: server.host.count("restore_snapshot"))

        before_a_restore(server, begin_another)
        refused = await server.http.post(url + "?action=restore", headers={"if-match": etag})
        assert (refused.status_code, refused.json()["error"]["details"]["reason"]) == (409, "action_under_way")
        held.set()
        assert (await first[0]).status_code == 204
        assert server.host.count("restore_snapshot") == 1


async def test_a_snapshot_has_an_etag_that_guards_its_deletion() -> None:
    async with running() as server:
        await server.create()
        url = f"/v1/snapshots/{(await taken(server))['id']}"
        etag = (await server.http.get(url)).headers["etag"]
        assert (await server.http.get(url, headers={"if-none-match": etag})).status_code == 304
        assert (await server.http.post(url + "?action=restore", headers={"if-match": etag})).status_code == 204
        assert (await server.http.delete(url, headers={"if-match": etag})).status_code == 412
        newer = (await server.http.get(url)).headers["etag"]
        assert (await server.http.delete(url, headers={"if-match": newer})).status_code == 204


async def test_a_deletion_that_takes_long_goes_on_by_itself() -> None:
    async with running(wait_s=0.05, lease_s=1.0) as server:
        await server.create()
        url = f"/v1/snapshots/{(await taken(server))['id']}"
        server.host.hold["delete_snapshot"] = held = asyncio.Event()
        assert (await server.http.delete(url)).status_code == 202
        server.host.hold.pop("delete_snapshot")
        held.set()

        async def is_gone() -> bool:
            return (await server.http.get(url)).status_code == 404

        await until(is_gone)
