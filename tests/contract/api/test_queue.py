"""Environments that wait for a place."""

import asyncio

import pytest
from control_harness import Running, config, next_message, running, stream, until
from msgspec.structs import replace

from fusevm.control import queue
from fusevm.model.host import Resources
from fusevm.testing.fake_host import FakeHost

TWO = Resources(cpus=100, ram_mb=1 << 20, storage_gb=1000, vm_count=2)


async def test_without_queue_seconds_a_full_fleet_refuses() -> None:
    async with running(FakeHost("h1", capacity=TWO)) as server:
        await server.create("a")
        await server.create("b")
        answer = await server.http.post("/v1/environments", json={"task_id": "c"})
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (503, "no_capacity")
        assert "machine_count" in answer.json()["error"]["message"]


async def test_who_waits_gets_the_next_place() -> None:
    async with running(FakeHost("h1", capacity=TWO)) as server:
        await server.create("a")
        await server.create("b")
        waiting = asyncio.create_task(server.create("c", queue_seconds=60))

        async def is_waiting() -> bool:
            answer = await server.get("c")
            return answer.status_code == 200 and bool(answer.json().get("queued_until"))

        await until(is_waiting)
        shown = (await server.get("c")).json()
        assert (shown["state"], shown.get("host_id", "")) == ("provisioning", "")
        await server.delete("a")
        made = await waiting
        assert (made["state"], made["host_id"]) == ("running", "h1")
        assert "queued_until" not in made


async def test_who_waits_too_long_fails_with_the_reason() -> None:
    async with running(FakeHost("h1", capacity=TWO)) as server:
        await server.create("a")
        await server.create("b")
        made = await server.create_ends("c", queue_seconds=1)
        assert made["reason"] == "no_capacity"
        async with stream(server, f"/v1/environments/fuse-c/events?uid={made['uid']}") as events:
            states = [(await next_message(events))[1]["state"] for _ in range(2)]
        assert states == ["provisioning", "failed"]


async def test_a_waiting_environment_can_be_deleted_at_once() -> None:
    async with running(FakeHost("h1", capacity=TWO)) as server:
        await server.create("a")
        await server.create("b")
        answer = await server.http.post(
            "/v1/environments", json={"task_id": "c", "queue_seconds": 60}, headers={"prefer": "respond-async"}
        )
        assert answer.status_code == 202
        assert (await server.delete("c")).status_code == 204
        assert server.host.count("create") == 2
        assert server.host.count("destroy") == 0


async def test_nobody_who_may_wait_goes_past_those_who_wait() -> None:
    async with running(FakeHost("h1", capacity=TWO)) as server:
        await server.create("a")
        await server.create("b")
        async with asyncio.TaskGroup() as group:
            first = group.create_task(server.create("first", queue_seconds=60))
            await until(lambda: server.plane.entry.has_line)
            second = group.create_task(server.create("second", queue_seconds=60))

            async def both_wait() -> bool:
                return len(await server.plane.store.queued(10)) == 2

            await until(both_wait)
            await server.delete("a")
            await until(first.done)
            assert not second.done()
            await server.delete("b")
        assert second.result()["state"] == "running"


LATER = {"prefer": "respond-async"}


async def _wait(server: Running, task_id: str, **body: object) -> None:
    """Somebody waits for a place."""
    body = {"task_id": task_id, "queue_seconds": 60, **body}
    answer = await server.http.post("/v1/environments", json=body, headers=LATER)
    assert answer.status_code == 202, answer.text


@pytest.mark.parametrize(
    ("spec", "status", "reason"),
    [({"image": "nowhere"}, 400, "image_not_found"), ({"host_id": "h9"}, 404, "host_not_found")],
)
async def test_what_can_never_be_placed_is_refused_also_while_others_wait(
    spec: dict[str, str], status: int, reason: str
) -> None:
    async with running(FakeHost("h1", capacity=TWO, images=["debian-12"])) as server:
        await until(lambda: server.host.count("info"))
        await server.create("a")
        await server.create("b")
        await _wait(server, "first")
        await until(lambda: server.plane.entry.has_line)
        body = {"task_id": "second", "queue_seconds": 60, "spec": spec}
        answer = await server.http.post("/v1/environments", json=body)
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (status, reason)


async def test_a_seed_for_a_pin_elsewhere_is_refused_also_while_others_wait() -> None:
    async with running(FakeHost("h1", capacity=TWO), FakeHost("h2", capacity=TWO)) as server:
        made = await server.create("a")
        seed = (await server.http.post("/v1/environments/fuse-a/snapshots")).json()["id"]
        other = "h2" if made["host_id"] == "h1" else "h1"
        await _wait(server, "first", spec={"ram_mb": 1 << 21})
        await until(lambda: server.plane.entry.has_line)
        body = {"task_id": "b", "queue_seconds": 60, "seed_snapshot_id": seed, "spec": {"host_id": other}}
        answer = await server.http.post("/v1/environments", json=body)
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (400, "bad_field")


async def test_newcomers_do_not_take_the_host_that_is_kept_free_for_a_seeded_one() -> None:
    """It fits nowhere else than where its snapshot is, so only that host can be kept for it."""
    policy = replace(config({}).policy, queue_patience_ms=1)
    async with running(FakeHost("h1", capacity=TWO), policy=policy) as server:
        await server.create("a")
        await server.create("b")
        seed = (await server.http.post("/v1/environments/fuse-a/snapshots")).json()["id"]
        large = {"spec": {"cpus": 4, "ram_mb": 1 << 20}, "seed_snapshot_id": seed}
        await _wait(server, "seeded", **large)
        await until(lambda: server.plane.entry.kept_free == "h1")
        assert (await server.delete("b")).status_code == 204
        answer = await server.http.post("/v1/environments", json={"task_id": "newcomer"})
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (503, "no_capacity")
        assert "kept_for_queue" in answer.json()["error"]["message"]
        assert (await server.delete("a")).status_code == 204

        async def is_placed() -> bool:
            return (await server.get("seeded")).json()["state"] == "running"

        await until(is_placed)
        assert server.plane.entry.kept_free == ""


async def test_a_line_of_what_fits_nowhere_hides_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """More wait that fit nowhere than are looked at together: what fits gets its place, of the same tenant too."""
    monkeypatch.setattr(queue, "LIMIT", 2)
    async with running(FakeHost("h1", capacity=TWO)) as server:
        for number in range(5):
            await _wait(server, f"huge{number}", spec={"ram_mb": 1 << 21})
        await until(lambda: server.plane.entry.has_line)
        made = await server.create("small", queue_seconds=60)
        assert (made["state"], made["host_id"]) == ("running", "h1")
