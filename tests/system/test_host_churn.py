"""200 machines come and go, many at a time, over real namespaces, rules, control groups and disks; VMMs are small
processes. Afterwards the host is as it was before."""

import json

import pytest
from churn import census, churn
from real_host import Host, until

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

#: As many at a time as two processors may hold by default.
CYCLES, BATCH = 200, 8


async def test_two_hundred_machines_leave_nothing(agent_host: Host):
    host = agent_host
    await host.start()
    # The first machine of a host makes what stays: a blank disk, parents of groups.
    await churn(host, range(1), 1, memory_mib=64, disk_bytes=64 << 20)
    assert await host.wait_empty() == []
    before = census(host)
    assert before["folders"] == [str(host.run_dir / "lock")]
    await churn(host, range(1, 1 + CYCLES), BATCH, memory_mib=64, disk_bytes=64 << 20)
    assert await host.wait_empty() == []

    def differs() -> dict[str, tuple[list[str], list[str]]]:
        after = census(host)
        return {kind: (before[kind], after[kind]) for kind in before if before[kind] != after[kind]}

    try:
        await until(lambda: not differs(), 60)
    except TimeoutError:
        raise AssertionError(differs()) from None
    state = json.loads(await host.ask("GET", "/state"))
    assert (state["journal"]["entries"], state["journal"]["reservations"]) == ([], [])
    # No sweep had to help.
    metrics = (await host.ask("GET", "/metrics")).decode()
    assert not [line for line in metrics.splitlines() if line.startswith("fuse_host_leftovers_removed_total{")]
    assert await host.stop() == 0
