"""Metrics without a server: bounded labels, readings that fail."""

import asyncio
from typing import NoReturn

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fusevm.control import fleet_gauges
from fusevm.control.fleet_gauges import Fleet, FleetGauges, read_fleet
from fusevm.control.metrics import MOST_VALUES, Bounded, Metrics
from fusevm.control.store.protocol import Tally
from fusevm.model.host import Host, Resources
from fusevm.testing.clock import FakeClock


def samples(text: bytes, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == name
    }


def test_the_first_values_of_a_label_are_kept_and_the_rest_is_one():
    label = Bounded(2)
    assert [label(value) for value in ("a", "b", "c", "a", "d")] == ["a", "b", "other", "a", "other"]


def test_keys_beyond_the_first_hundred_are_counted_together():
    metrics = Metrics()
    for number in range(MOST_VALUES + 5):
        metrics.key_used(f"ak_{number}")
    found = samples(metrics.render(), "orchestrator_api_key_requests_total")
    assert len(found) == MOST_VALUES + 1
    assert found["other",] == 5


def test_tenants_with_few_machines_are_added_up_when_there_are_many():
    usage = {f"t{number:03}": Resources(vm_count=number + 1) for number in range(MOST_VALUES + 2)}
    tally = Tally(live={}, queued=0, queued_since_ms=None, snapshots={})
    text = Metrics().render(FleetGauges(tally=tally, usage=usage))
    found = samples(text, "orchestrator_tenant_allocated")
    assert found["vm_count", "t101"] == 102
    assert found["vm_count", "other"] == 1 + 2
    assert ("vm_count", "t000") not in found


def test_the_view_of_a_host_grows_old_until_it_is_closed():
    now = 100.0
    metrics = Metrics(lambda: now)
    view = metrics.watching("h1")
    now = 107.5
    assert samples(metrics.render(), "orchestrator_watcher_lag_seconds") == {("h1",): 7.5}
    assert samples(metrics.render(), "orchestrator_host_up") == {}
    newer = metrics.watching("h1")
    view.close()
    assert samples(metrics.render(), "orchestrator_watcher_lag_seconds") == {("h1",): 0.0}
    newer.close()
    assert samples(metrics.render(), "orchestrator_watcher_lag_seconds") == {}


class Hanging:
    """A store that never answers."""

    async def tally(self) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError

    hosts = usage_by_tenant = tally


async def test_a_store_that_hangs_does_not_hold_up_a_scrape():
    fleet = await read_fleet(Hanging(), 0, timeout_s=0.01)
    text = Metrics().render(fleet)
    assert samples(text, "orchestrator_store_up") == {(): 0.0}
    assert samples(text, "orchestrator_queue_length") == {}


class Counting:
    """A store that counts how often it is read."""

    def __init__(self) -> None:
        self.readings = 0

    async def tally(self) -> Tally:
        self.readings += 1
        await asyncio.sleep(0)
        return Tally(live={"running": self.readings}, queued=0, queued_since_ms=None, snapshots={})

    async def hosts(self) -> list[Host]:
        return []

    async def usage_by_tenant(self) -> dict[str, Resources]:
        return {}


async def test_whoever_asks_often_does_not_make_the_database_work(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Counting()
    fleet = Fleet(store, FakeClock())
    await asyncio.gather(*(fleet.gauges() for _ in range(100)))
    text = Metrics().render(await fleet.gauges())
    assert store.readings == 1
    assert samples(text, "orchestrator_fleet_tracked_vms") == {("running",): 1.0}
    monkeypatch.setattr(fleet_gauges, "FRESH_S", 0.0)
    fleet = Fleet(store, FakeClock())
    for _ in range(3):
        await fleet.gauges()
    assert store.readings == 4
