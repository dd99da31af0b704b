"""Environments that wait for a place."""

import asyncio

from control_harness import next_message, running, stream, until

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
        made = await server.create("c", queue_seconds=1)
        assert (made["state"], made["reason"]) == ("failed", "no_capacity")
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
