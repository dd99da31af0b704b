"""20 real machines come and go, a few at a time; afterwards the host is as it was before."""

import pytest
from churn import census, churn
from real_host import Host, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

CYCLES, BATCH = 20, 4


async def test_twenty_real_machines_leave_nothing(host: Host):
    await host.start()
    await churn(host, range(1), 1, memory_mib=128)
    assert await host.wait_empty() == []
    before = census(host)
    await churn(host, range(1, 1 + CYCLES), BATCH, memory_mib=128)
    assert await host.wait_empty() == []
    await until(lambda: census(host) == before, 60)
    assert await host.stop() == 0
