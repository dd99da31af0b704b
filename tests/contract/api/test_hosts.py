"""Hosts over the API: register, cordon, drain, delete, and what a registration is checked for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from control_harness import Policy, Running, running, served, until
from msgspec.structs import replace

from fusevm.control.store.protocol import Reading
from fusevm.model.errors import HostRejected
from fusevm.model.host import HostHealth, Resources
from fusevm.testing.clock import FakeClock
from fusevm.testing.fake_host import FakeHost

CAPACITY = {"cpus": 4, "ram_mb": 4096, "storage_gb": 100, "vm_count": 10}


@contextlib.asynccontextmanager
async def fleet(secret: str = "", **changes: object) -> AsyncIterator[tuple[Running, FakeHost, str]]:
    """A control plane with `h1`, and another host that is not registered yet, over HTTP."""
    other = FakeHost("h2", capacity=Resources(cpus=8, ram_mb=8192, storage_gb=200, vm_count=20))
    async with served(other, secret) as url, running(**changes) as server:
        yield server, other, url


async def register(server: Running, url: str, **fields: object) -> dict[str, object]:
    answer = await server.http.post("/v1/hosts", json={"id": "h2", "url": url, **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def amounts(host: dict[str, Any]) -> dict[str, int]:
    """Its capacity, as far as it can be booked."""
    return {name: host["capacity"][name] for name in CAPACITY}


async def test_a_registered_host_is_asked_for_its_capacity_and_takes_environments() -> None:
    async with fleet() as (server, other, url):
        host = await register(server, url, region="north", labels={"disk": "fast"})
        assert amounts(host) == {"cpus": 8, "ram_mb": 8192, "storage_gb": 200, "vm_count": 20}
        assert (host["state"], host["region"], host["labels"]) == ("active", "north", {"disk": "fast"})
        assert "warnings" not in host
        env = await server.create("t2", spec={"region": "north"})
        assert (env["host_id"], env["state"]) == ("h2", "running")
        assert other.count("create") == 1


async def test_zeros_mean_unset_as_the_sdk_sends_them() -> None:
    async with fleet() as (server, _, url):
        zeros = {"cpus": 0, "ram_mb": 0, "storage_gb": 0, "vm_count": 0, "arch": "", "gpus": 0, "gpu_kind": ""}
        host = await register(server, url, capacity=zeros, token="", region="", backend="", labels={})
        assert amounts(host) == {"cpus": 8, "ram_mb": 8192, "storage_gb": 200, "vm_count": 20}


async def test_what_is_declared_wins_and_is_remarked_upon() -> None:
    async with fleet() as (server, _, url):
        host = await register(server, url, capacity={"cpus": 2, "vm_count": 3})
        assert amounts(host) == {"cpus": 2, "ram_mb": 8192, "storage_gb": 200, "vm_count": 3}
        warnings = host["warnings"]
        assert isinstance(warnings, list)
        assert any("cpus" in warning for warning in warnings)

        async def was_seen() -> bool:
            return bool((await server.http.get("/v1/hosts/h2")).json().get("version"))

        await until(was_seen)
        assert (await server.http.get("/v1/hosts/h2")).json()["capacity"]["cpus"] == 2


async def test_registering_again_keeps_bookings_cordon_and_age() -> None:
    async with fleet() as (server, _, url):
        first = await register(server, url)
        await server.create("t2", spec={"host_id": "h2"})
        assert (await server.http.post("/v1/hosts/h2?action=cordon")).status_code == 204
        again = await register(server, url, region="south")
        assert (again["state"], again["region"], again["created_at"]) == ("cordoned", "south", first["created_at"])
        allocated = again["allocated"]
        assert isinstance(allocated, dict)
        assert allocated["vm_count"] == 1


async def test_a_wrong_token_is_told_at_once() -> None:
    async with fleet(secret="right") as (server, _, url):
        answer = await server.http.post("/v1/hosts", json={"id": "h2", "url": url, "token": "wrong"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "unauthorized")
        assert (await server.http.get("/v1/hosts/h2")).status_code == 404


async def test_a_host_that_does_not_answer_needs_its_whole_capacity_declared() -> None:
    async with running() as server:
        body = {"id": "h2", "url": "http://127.0.0.1:1"}
        refused = await server.http.post("/v1/hosts", json=body)
        assert refused.status_code == 503
        taken = await server.http.post("/v1/hosts", json={**body, "capacity": CAPACITY})
        assert taken.status_code == 201
        assert "does not answer" in taken.json()["warnings"][0]
        assert amounts(taken.json()) == CAPACITY


async def test_another_architecture_than_the_hosts_is_refused() -> None:
    async with fleet() as (server, _, url):
        answer = await server.http.post("/v1/hosts", json={"id": "h2", "url": url, "capacity": {"arch": "aarch64"}})
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (400, "host_mismatch")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"id": "a b"}, "id"),
        ({"id": ""}, "id"),
        ({"url": "ftp://x"}, "url"),
        ({"url": "http://10.0.0.1:8090"}, "url"),
        ({"url": "https://user@host"}, "url"),
        ({"backend": "xen"}, "backend"),
        ({"labels": {"a b": "c"}}, "labels"),
        ({"capacity": {"cpus": -1}}, "capacity.cpus"),
        ({"capacity": {"arch": "mips"}}, "capacity.arch"),
    ],
)
async def test_a_registration_that_can_never_work_names_the_field(body: dict[str, object], field: str) -> None:
    async with running() as server:
        sent = {"id": "h2", "url": "http://127.0.0.1:1", **body}
        answer = await server.http.post("/v1/hosts", json=sent)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"].startswith(field)


@pytest.mark.parametrize("url", ["unix:///run/docker.sock", "http://127.0.0.1:{port}", "http://localhost:{port}"])
async def test_a_registration_does_not_reach_other_services_of_this_machine(url: str) -> None:
    """Neither is asked, whether its capacity is declared or not."""
    reached = asyncio.Event()
    service = await asyncio.start_server(lambda *_: reached.set(), "127.0.0.1", 0)
    async with service, running(allow_local_hosts=False) as server:
        body = {"id": "h2", "url": url.format(port=service.sockets[0].getsockname()[1])}
        for fields in ({}, {"capacity": CAPACITY}, {"id": "h1"}):
            answer = await server.http.post("/v1/hosts", json=body | fields)
            assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "url")
            assert "FUSE_ALLOW_LOCAL_HOSTS" in answer.json()["error"]["message"]
        assert (await server.http.get("/v1/hosts/h2")).status_code == 404
        assert not reached.is_set()


async def test_the_host_of_the_settings_and_hosts_with_a_pin_are_registered_anywhere() -> None:
    async with running(allow_local_hosts=False, encryption_key="ab" * 32) as server:
        same = {"id": "h1", "url": "http://127.0.0.1:1", "labels": {"a": "b"}, "capacity": CAPACITY}
        assert (await server.http.post("/v1/hosts", json=same)).status_code == 201
        pinned = {"id": "h2", "url": "https://127.0.0.1:1", "token": f"secret.{'ab' * 32}", "capacity": CAPACITY}
        assert (await server.http.post("/v1/hosts", json=pinned)).status_code == 201


async def test_a_cordoned_host_gets_nothing_new_and_keeps_what_runs() -> None:
    async with running() as server:
        await server.create()
        assert (await server.http.post("/v1/hosts/h1?action=cordon")).status_code == 204
        refused = await server.http.post("/v1/environments", json={"task_id": "t2"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert "cordoned" in refused.json()["error"]["message"]
        assert (await server.get()).json()["state"] == "running"
        assert (await server.http.post("/v1/hosts/h1?action=uncordon")).status_code == 204
        assert (await server.create("t2"))["state"] == "running"


async def test_a_drain_of_a_host_drains_its_environments() -> None:
    async with running() as server:
        await server.create()
        assert (await server.http.post("/v1/hosts/h1?action=drain")).status_code == 204
        assert (await server.http.get("/v1/hosts/h1")).json()["state"] == "draining"
        assert (await server.get()).json()["state"] == "draining"
        assert (await server.http.post("/v1/hosts/h1?action=drain")).status_code == 204


async def test_a_host_with_environments_is_not_deleted() -> None:
    async with running() as server:
        await server.create()
        answer = await server.http.delete("/v1/hosts/h1?force=true")
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (409, "host_in_use")
        await server.delete()
        assert (await server.http.delete("/v1/hosts/h1")).status_code == 204
        assert (await server.http.get("/v1/hosts/h1")).status_code == 404
        assert (await server.http.delete("/v1/hosts/h1")).status_code == 404


async def test_a_silent_host_is_not_removed_by_force_before_it_is_lost() -> None:
    policy = Policy(host_unreachable_ms=200, host_lost_ms=600_000)
    async with running(policy=policy, checked=False) as server:
        await server.create()
        server.host.is_down = True

        async def is_unreachable() -> bool:
            return (await server.http.get("/v1/hosts/h1")).json()["health"] == "unreachable"

        await until(is_unreachable)
        refused = await server.http.delete("/v1/hosts/h1?force=true")
        assert (refused.status_code, refused.json()["error"]["details"]["reason"]) == (409, "host_in_use")
        assert (await server.get()).json()["state"] == "running"


async def test_a_dead_host_is_lost_and_can_be_removed() -> None:
    """What ran there ends by itself, so that nothing waits for a host that never answers again."""
    policy = Policy(host_unreachable_ms=100, host_lost_ms=300)
    async with running(policy=policy, checked=False) as server:
        env = await server.create()
        snapshot = (await server.http.post("/v1/environments/fuse-t1/snapshots")).json()
        server.host.is_down = True

        async def has_ended() -> bool:
            return (await server.get(uid=env["uid"])).json()["state"] == "failed"

        await until(has_ended)
        assert (await server.get(uid=env["uid"])).json()["reason"] == "host_lost"
        assert (await server.http.delete("/v1/hosts/h1")).status_code == 204
        assert (await server.http.get("/v1/hosts/h1")).status_code == 404
        left = (await server.http.get(f"/v1/snapshots/{snapshot['id']}")).json()
        assert (left["state"], left["last_error"]) == ("error", "host h1, where its bytes are, was removed")


async def test_a_lost_host_that_still_has_environments_is_removed_by_force() -> None:
    """Between the loss of a host and the end of what ran there, or where nobody watches it."""
    async with running(heartbeat_s=600.0, checked=False) as server:
        env = await server.create()
        host = await server.plane.store.host("h1")
        assert host is not None
        await server.plane.store.save_host(replace(host, health=HostHealth.LOST))
        assert (await server.http.delete("/v1/hosts/h1")).status_code == 409
        assert (await server.http.delete("/v1/hosts/h1?force=true")).status_code == 204
        ended = (await server.get(uid=env["uid"])).json()
        assert (ended["state"], ended["reason"]) == ("failed", "host_lost")


async def test_what_comes_up_on_a_host_that_is_drained_is_drained_too() -> None:
    host = FakeHost("h1")
    async with running(host) as server:
        host.hold["create"] = asyncio.Event()
        creating = asyncio.create_task(server.http.post("/v1/environments", json={"task_id": "t1"}))
        await until(lambda: host.count("create"))
        assert (await server.http.post("/v1/hosts/h1?action=drain")).status_code == 204
        assert (await server.get()).json()["state"] == "provisioning"
        host.hold.pop("create").set()
        assert (await creating).status_code == 201

        async def is_drained() -> bool:
            return (await server.get()).json()["state"] == "draining"

        await until(is_drained)


async def test_what_is_busy_when_its_host_is_drained_is_drained_afterwards() -> None:
    host = FakeHost("h1")
    async with running(host) as server:
        await server.create("a")
        await server.create("b")
        host.hold["take_snapshot"] = asyncio.Event()
        taking = asyncio.create_task(server.http.post("/v1/environments/fuse-a/snapshots"))
        await until(lambda: host.count("take_snapshot"))
        assert (await server.http.post("/v1/hosts/h1?action=drain")).status_code == 204
        assert (await server.get("b")).json()["state"] == "draining"
        assert (await server.get("a")).json()["state"] == "running"
        host.hold.pop("take_snapshot").set()
        assert (await taking).status_code == 201

        async def is_drained() -> bool:
            return (await server.get("a")).json()["state"] == "draining"

        await until(is_drained)


async def test_a_host_that_is_registered_again_elsewhere_is_watched_there() -> None:
    async with fleet() as (server, _, url):
        await register(server, url)
        moved = FakeHost("h2", capacity=Resources(cpus=16, ram_mb=8192, storage_gb=200, vm_count=20))
        async with served(moved) as new_url:
            await register(server, new_url)
            await until(lambda: moved.count("events") and moved.count("machines"))
            assert (await server.http.get("/v1/hosts/h2")).json()["capacity"]["cpus"] == 16


async def test_a_known_host_is_updated_without_its_token() -> None:
    async with fleet(secret="right") as (server, _, url):
        await register(server, url, token="right")
        again = await register(server, url, region="south")
        assert again["region"] == "south"
        assert (await server.create("t2", spec={"host_id": "h2"}))["state"] == "running"


async def test_a_host_has_an_etag_that_changes_with_it() -> None:
    async with fleet(heartbeat_s=600.0) as (server, _, url):
        made = await server.http.post("/v1/hosts", json={"id": "h2", "url": url})
        etag = made.headers["etag"]
        cordon = "/v1/hosts/h2?action=cordon"
        assert (await server.http.get("/v1/hosts/h2", headers={"if-none-match": etag})).status_code == 304
        assert (await server.http.post(cordon, headers={"if-match": etag})).status_code == 204
        assert (await server.http.post(cordon, headers={"if-match": etag})).status_code == 412
        assert (await server.http.delete("/v1/hosts/h2", headers={"if-match": etag})).status_code == 412
        assert (await server.http.get("/v1/hosts/h2")).headers["etag"] != etag


async def test_the_etag_of_a_host_tells_bookings_apart_and_its_revision_still_allows_a_change() -> None:
    async with running(heartbeat_s=600.0) as server:
        before = await server.http.get("/v1/hosts/h1")
        await server.create()
        after = await server.http.get("/v1/hosts/h1", headers={"if-none-match": before.headers["etag"]})
        assert after.status_code == 200
        assert after.json()["allocated"] != before.json().get("allocated")
        etag = after.headers["etag"]
        assert etag != before.headers["etag"]
        assert (await server.http.get("/v1/hosts/h1", headers={"if-none-match": etag})).status_code == 304
        # What a change of the host would overwrite is as it was seen.
        cordon = "/v1/hosts/h1?action=cordon"
        assert (await server.http.post(cordon, headers={"if-match": before.headers["etag"]})).status_code == 204
        assert (await server.http.post(cordon, headers={"if-match": etag})).status_code == 412


async def test_a_host_that_changes_while_it_is_removed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(heartbeat_s=600.0) as server:
        store = server.plane.store
        etag = (await server.http.get("/v1/hosts/h1")).headers["etag"]
        on_host = store.on_host

        async def changed_meanwhile(host_id: str) -> Reading:
            assert (await server.http.post("/v1/hosts/h1?action=cordon")).status_code == 204
            return await on_host(host_id)

        monkeypatch.setattr(store, "on_host", changed_meanwhile)
        answer = await server.http.delete("/v1/hosts/h1", headers={"if-match": etag})
        monkeypatch.undo()
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (412, "precondition_failed")
        current = answer.json()["error"]["details"]["etag"]
        assert (await server.http.delete("/v1/hosts/h1", headers={"if-match": current})).status_code == 204


async def test_a_host_that_refuses_us_can_be_removed_by_force() -> None:
    """It never becomes lost, so that nothing else would ever end what was placed there."""
    async with running(policy=Policy(host_unreachable_ms=100), checked=False) as server:
        env = await server.create()
        server.host.script("info", *[HostRejected(id="h1")] * 10_000)

        async def is_unreachable() -> bool:
            return (await server.http.get("/v1/hosts/h1")).json()["health"] == "unreachable"

        await until(is_unreachable)
        assert "refused the token" in (await server.http.get("/v1/hosts")).json()["hosts"][0]["problem"]
        assert (await server.http.delete("/v1/hosts/h1")).status_code == 409
        assert (await server.http.delete("/v1/hosts/h1?force=true")).status_code == 204
        ended = (await server.get(uid=env["uid"])).json()
        assert (ended["state"], ended["reason"]) == ("failed", "host_lost")


async def test_environments_are_told_how_their_host_is() -> None:
    clock = FakeClock()
    async with running(clock=clock) as server:
        env = await server.create()

        async def told() -> list[tuple[str, str]]:
            facts = await server.plane.store.facts_of(env["uid"], 0, 100)
            return [(stored.fact.kind, stored.fact.reason) for stored in facts if stored.fact.kind != "state"]

        async def has_told(*reasons: str) -> bool:
            return await told() == [("host", reason) for reason in reasons]

        async def silence(ms: int) -> None:
            for _ in range(0, ms + 1, 15_000):
                beats = server.host.count("info")
                await until(lambda beats=beats: server.host.count("info") > beats + 1)
                clock.advance(15_000)

        server.host.is_down = True
        await silence(15_000)
        await until(lambda: has_told("unreachable"))
        server.host.is_down = False
        await until(lambda: has_told("unreachable", "ok"))
        server.host.is_down = True
        await silence(135_000)
        await until(lambda: has_told("unreachable", "ok", "unreachable", "lost"))
        facts = [stored.fact for stored in await server.plane.store.facts_of(env["uid"], 0, 100)]
        assert [fact.seq for fact in facts] == list(range(1, len(facts) + 1))
        first = next(fact for fact in facts if fact.kind == "host")
        assert first.data == {"host_id": "h1"}
        assert "does not answer" in first.message
        assert facts[-1].reason == "host_lost"


async def test_a_snapshot_of_a_removed_host_is_no_layer_and_no_seed() -> None:
    hosts = [FakeHost("h1"), FakeHost("h2")]
    async with running(*hosts, checked=False) as server:
        await server.create(spec={"host_id": "h2"})
        body = {"layer_key": "k"}
        snapshot = (await server.http.post("/v1/environments/fuse-t1/snapshots", json=body)).json()
        await server.delete()
        url = "/v1/snapshots/resolve?layer_key=k&arch=amd64"
        assert (await server.http.get(url)).json()["found"] is True
        assert (await server.http.delete("/v1/hosts/h2")).status_code == 204
        assert (await server.http.get(url)).json() == {"found": False}
        seeded = await server.http.post("/v1/environments", json={"task_id": "t2", "seed_snapshot_id": snapshot["id"]})
        assert (seeded.status_code, seeded.json()["error"]["details"]["reason"]) == (409, "snapshot_not_ready")
        assert (await server.http.delete(f"/v1/snapshots/{snapshot['id']}")).status_code == 204


async def test_unknown_actions_and_hosts_are_told_apart() -> None:
    async with running() as server:
        assert (await server.http.post("/v1/hosts/h9?action=cordon")).status_code == 404
        unknown = await server.http.post("/v1/hosts/h1?action=explode")
        assert unknown.json()["error"]["details"]["reason"] == "unknown_action"
