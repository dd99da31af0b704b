"""What the control plane measures, as a scrape shows it."""

import asyncio
from functools import partial

import pytest
from control_harness import Policy, Running, next_message, running, stream, until
from prometheus_client.parser import text_string_to_metric_families

from fusevm.control import fleet_gauges
from fusevm.control.store.statements import Statement
from fusevm.model.host import Resources
from fusevm.model.setup import HealthStatus, Verdict
from fusevm.testing.clock import FakeClock
from fusevm.testing.fake_host import FakeHost

#: What dashboards of the contract read, without its namespace.
OF_THE_CONTRACT = {
    "reconcile_duration_seconds",
    "reconcile_cycles",
    "fleet_tracked_vms",
    "fleet_provider_vms",
    "reconcile_orphans_destroyed",
    "reconcile_orphans_failed",
    "reconcile_orphans_dead_lettered",
    "reconcile_stuck_tasks_suspected",
    "reconcile_stuck_tasks_failed",
    "reconcile_idle_vms_suspected",
    "reconcile_idle_vms_failed",
    "reconcile_vms_missing_provider",
    "reconcile_health_checked_vms",
    "reconcile_health_failing_vms",
    "http_requests",
    "http_request_duration_seconds",
    "http_requests_in_flight",
    "operations",
    "operations_duration_seconds",
}
MASTER = {"authorization": "Bearer master-token-master-token"}


@pytest.fixture(autouse=True)
def _fresh_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_gauges, "FRESH_S", 0.0)


async def scrape(server: Running) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Name and labels to value."""
    answer = await server.http.get("/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def value(server: Running, name: str, **labels: str) -> float | None:
    """One sample; None: it is not there."""
    return (await scrape(server)).get((f"orchestrator_{name}", tuple(sorted(labels.items()))))


async def names(server: Running) -> set[str]:
    return {name for name, _ in await scrape(server)}


async def test_every_metric_of_the_contract_is_there() -> None:
    async with running() as server:
        text = (await server.http.get("/metrics")).text
    found = {family.name for family in text_string_to_metric_families(text)}
    assert {f"orchestrator_{name}" for name in OF_THE_CONTRACT} <= found


async def test_an_end_at_a_limit_is_told_when_it_begins_and_when_it_is_over() -> None:
    host, clock = FakeHost("h1"), FakeClock()
    async with running(host, clock=clock) as server:
        for kind, spec in (
            ("stuck_tasks", {"max_runtime_seconds": 60}),
            ("idle_vms", {"idle_timeout_seconds": 60}),
        ):
            suspected, failed = (f"reconcile_{kind}_{what}_total" for what in ("suspected", "failed"))
            await server.create(kind, spec=spec)
            host.hold["destroy"] = asyncio.Event()
            clock.advance(120_000)

            async def is_counted(name: str) -> bool:
                return await value(server, name) == 1

            await until(partial(is_counted, suspected))
            assert await value(server, failed) == 0
            host.hold["destroy"].set()
            await until(partial(is_counted, failed))
            assert await value(server, suspected) == 1


async def test_an_action_is_counted_by_host_and_tenant_and_a_start_by_phase() -> None:
    async with running() as server:
        await server.create(startup_script="true")
        await server.delete()

        async def is_told() -> bool:
            return await value(server, "phase_duration_seconds_count", phase="setup") == 1

        await until(is_told)  # after the answer
        found = await scrape(server)

    def at(name: str, **labels: str) -> float | None:
        return found.get((f"orchestrator_{name}", tuple(sorted(labels.items()))))

    for op in ("boot", "setup", "destroy"):
        assert at("operations_total", op=op, result="ok") == 1
        assert at("operations_duration_seconds_count", op=op) == 1
        assert at("host_operations_total", host="h1", op=op, result="ok") == 1
        assert at("tenant_operations_total", tenant="-", op=op, result="ok") == 1
    for phase in ("schedule", "prepare", "boot", "agent", "setup"):
        assert at("phase_duration_seconds_count", phase=phase) == 1
    assert at("environment_start_seconds_count", tenant="-") == 1
    assert at("environments_ended_total", state="destroyed", reason="deleted") == 1
    assert at("operations_duration_seconds_bucket", op="boot", le="600.0") == 1


async def test_tenants_are_told_apart() -> None:
    async with running(auth_token="master-token-master-token", headers=MASTER) as server:
        made = (await server.http.post("/v1/api-keys", json={"tenant": "acme"})).json()
        key = {"authorization": f"Bearer {made['key']}"}
        answer = await server.http.post("/v1/environments", json={"task_id": "t1"}, headers=key)
        assert answer.status_code == 201
        await server.create("t2")
        assert await value(server, "tenant_operations_total", tenant="acme", op="boot", result="ok") == 1
        assert await value(server, "tenant_allocated", tenant="acme", resource="vm_count") == 1
        assert await value(server, "tenant_allocated", tenant="-", resource="vm_count") == 1
        assert await value(server, "api_key_requests_total", key=made["id"]) == 1


async def test_whoever_waits_for_a_place_is_counted_and_so_is_the_waiting() -> None:
    host = FakeHost("h1", capacity=Resources(cpus=100, ram_mb=1 << 20, storage_gb=1000, vm_count=1))
    async with running(host) as server:
        await server.create("a")
        assert await value(server, "queue_length") == 0
        assert await value(server, "queue_oldest_wait_seconds") == 0
        waiting = asyncio.create_task(server.create("b", queue_seconds=600))

        async def is_shown() -> bool:
            waited = await value(server, "queue_oldest_wait_seconds")
            return await value(server, "queue_length") == 1 and waited is not None and waited > 0

        await until(is_shown)
        await server.delete("a")
        await waiting
        assert await value(server, "queue_length") == 0
        assert await value(server, "queue_wait_seconds_count", result="placed") == 1
        refused = await server.http.post("/v1/environments", json={"task_id": "c", "queue_seconds": 1})
        assert refused.status_code == 503
        assert await value(server, "queue_wait_seconds_count", result="expired") == 1


async def test_the_gauges_of_a_host_are_gone_while_it_is_silent_and_back_with_it() -> None:
    host = FakeHost("h1")
    async with running(host, policy=Policy(host_unreachable_ms=100, host_lost_ms=600_000)) as server:
        await server.create()
        capacity = {"host": "h1", "resource": "vm_count"}

        async def is_shown() -> bool:
            return (
                await value(server, "host_up", host="h1") == 1
                and await value(server, "fleet_provider_vms", host="h1") == 1
                and await value(server, "host_capacity", **capacity) == 1000
            )

        async def is_gone() -> bool:
            return (
                await value(server, "host_up", host="h1") == 0
                and await value(server, "fleet_provider_vms", host="h1") is None
                and await value(server, "host_capacity", **capacity) is None
            )

        await until(is_shown)
        host.is_down = True
        await until(is_gone)
        assert await value(server, "host_allocated", **capacity) == 1
        assert await value(server, "hosts", state="active", health="unreachable") == 1
        first = await value(server, "watcher_lag_seconds", host="h1")
        assert first is not None

        async def is_later() -> bool:
            lag = await value(server, "watcher_lag_seconds", host="h1")
            return lag is not None and lag > first

        await until(is_later)
        host.is_down = False
        await until(is_shown)


async def test_a_replica_that_has_lost_a_host_tells_nothing_about_it() -> None:
    async with running(lease_s=1.0, checked=False) as server:
        await until(lambda: "h1" in server.plane.metrics.views)
        taken = "update hosts set lease_owner = 'another replica', lease_until_ms = 9000000000000"
        await server.plane.store._engine.apply(Statement("", (), taken))

        async def is_gone() -> bool:
            about = [name for name, labels in await scrape(server) if ("host", "h1") in labels]
            return not {"orchestrator_host_up", "orchestrator_watcher_lag_seconds"} & set(about)

        await until(is_gone)
        assert await value(server, "leases_lost_total", kind="host") == 1
        assert await value(server, "host_capacity", host="h1", resource="cpus") == 1000, "the store knows it"


async def test_streams_are_counted_and_events_are_timed_once_they_are_live() -> None:
    async with running() as server:
        await server.create()
        async with stream(server, "/v1/environments/fuse-t1/events?last_event_id=" + await first_id(server)) as events:
            await next_message(events)
            assert await value(server, "event_streams") == 1
            assert await value(server, "event_lag_seconds_count") == 0, "what was replayed is not late"
            await server.act("t1", "drain")
            while (await next_message(events))[1]["state"] != "draining":
                pass
            assert (await value(server, "event_lag_seconds_count") or 0) >= 1

        async def is_over() -> bool:
            return await value(server, "event_streams") == 0

        await until(is_over)


async def first_id(server: Running) -> str:
    return f"{(await server.get()).json()['uid']}.0"


async def test_the_store_is_timed_and_its_failures_are_counted() -> None:
    async with running() as server:
        await server.create()
        assert (await server.http.post("/v1/environments", json={"task_id": "t1"})).status_code == 409
        assert await value(server, "store_up") == 1
        assert (await value(server, "store_transaction_duration_seconds_count", kind="write") or 0) > 0
        assert (await value(server, "store_transaction_duration_seconds_count", kind="read") or 0) > 0
        assert await value(server, "store_transaction_failures_total", kind="write", reason="task_exists") == 1
        assert (await value(server, "store_batch_transactions_count") or 0) > 0


async def test_a_store_that_is_broken_is_said_to_be_down_and_its_gauges_are_gone() -> None:
    async with running(checked=False) as server:
        await server.create()
        assert await value(server, "fleet_tracked_vms", state="running") == 1
        await server.plane.store._engine.apply(Statement("", (), "drop table snapshots"))
        assert await value(server, "store_up") == 0
        gone = {"orchestrator_fleet_tracked_vms", "orchestrator_queue_length", "orchestrator_host_allocated"}
        assert not gone & await names(server)
        assert await value(server, "operations_total", op="boot", result="ok") == 1


async def test_snapshots_are_counted_with_their_bytes() -> None:
    async with running() as server:
        await server.create()
        await server.http.post("/v1/environments/fuse-t1/snapshots")
        await server.http.post("/v1/environments/fuse-t1/snapshots")
        assert await value(server, "snapshots", host="h1", state="ready") == 2
        assert await value(server, "snapshots_bytes", host="h1", state="ready") == 2 << 20


async def test_health_checks_that_fail_are_counted() -> None:
    async with running() as server:
        env = await server.create(healthcheck={"http": {"port": 80}})
        guest = server.host.guests[(await server.record(env["uid"])).machine_id]
        guest.health = HealthStatus(state=Verdict.FAILING, failures=3)

        async def is_counted() -> bool:
            checked = await value(server, "reconcile_health_checked_vms")
            return (checked, await value(server, "reconcile_health_failing_vms")) == (1, 1)

        await until(is_counted)


async def test_what_clients_choose_makes_no_series() -> None:
    async with running() as server:
        for number in range(3):
            await server.http.request(f"METHOD{number}", "/v1/environments")
            await server.http.get(f"/nowhere/{number}")
        methods = {dict(labels).get("method") for _, labels in await scrape(server)}
        assert methods <= {None, "GET", "other"}
        routes = {dict(labels).get("route") for _, labels in await scrape(server)}
        assert routes <= {None, "none", "metrics"}


async def test_machines_that_are_missing_and_that_have_ended_are_told_apart() -> None:
    async with running() as server:
        await server.create("a")
        await server.create("b")
        missing, ended = list(server.host.table)
        server.host.forget(missing)
        server.host.crash(ended)

        async def is_counted() -> bool:
            found = await scrape(server)
            both = ("reconcile_vms_missing_provider_total", "reconcile_vms_exited_total")
            return all(found.get((f"orchestrator_{name}", ())) == 1 for name in both)

        await until(is_counted)
        assert await value(server, "environments_ended_total", state="failed", reason="machine_exited") in (None, 1)
