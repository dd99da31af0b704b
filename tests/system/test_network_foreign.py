"""Other programs' firewalls in the way of our machines."""

import contextlib
from collections.abc import AsyncIterator

import pytest
from namespaces import private_network
from network_lab import PLAN, SERVER, Guest, internet, plugged_in, sh, snapshot_of_host

from fusevm.host.fitness.rules import base_chains, find_earlier
from fusevm.host.net.network import HostNetwork

#: As Docker and ufw leave it: policy drop, some exceptions.
DOCKER = """
table ip filter {
  chain DOCKER-USER { return; }
  chain FORWARD { type filter hook forward priority filter; policy drop;
    counter jump DOCKER-USER
    oifname "docker0" ct state established,related accept
  }
}
"""
#: As firewalld leaves it: policy accept, and a reject at the end of a chain of zones.
FIREWALLD = """
table inet firewalld {
  chain filter_FWD_public { ct state invalid drop; reject with icmpx admin-prohibited; }
  chain filter_FORWARD_ZONES { iifname "other0" goto filter_FWD_public; goto filter_FWD_public; }
  chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;
    ct state established,related accept
    iifname "lo" accept
    jump filter_FORWARD_ZONES
  }
}
"""
#: An administrator's own rule, which says nothing about most packets.
SELECTIVE = """
table inet admin {
  chain forward { type filter hook forward priority filter; policy accept; tcp dport 25 drop; }
}
"""


@contextlib.asynccontextmanager
async def one_machine() -> AsyncIterator[tuple[HostNetwork, Guest]]:
    async with internet(), contextlib.AsyncExitStack() as stack:
        network = HostNetwork(PLAN, warm=0)
        await network.open({})
        stack.push_async_callback(network.close)
        guest = await stack.enter_async_context(plugged_in(await network.acquire(0)))
        yield network, guest


@private_network
async def test_a_foreign_chain_that_drops_gets_a_passage_which_goes_with_us():
    await check(DOCKER, blocking=1)


@private_network
async def test_a_foreign_chain_that_rejects_at_its_end_gets_a_passage_which_goes_with_us():
    await check(FIREWALLD, blocking=1)


@private_network
async def test_all_foreign_chains_get_a_passage():
    await check(DOCKER + FIREWALLD + SELECTIVE, blocking=2)


@private_network
async def test_a_foreign_chain_that_comes_before_ours_is_found_by_the_doctor():
    hooks = ("prerouting", "forward", "input")
    sh(f"nft -f - <<'END'\n{DOCKER + FIREWALLD + SELECTIVE}\nEND")
    async with one_machine():
        ruleset = sh("nft -y list ruleset")
        ours = {chain.hook for chain in base_chains(ruleset) if chain.table == PLAN.table}
        assert ours >= set(hooks)
        assert find_earlier(ruleset, PLAN.table, hooks) is None
        sh("nft 'add chain inet admin early { type filter hook forward priority mangle; }'")
        assert find_earlier(sh("nft -y list ruleset"), PLAN.table, hooks) is None
        sh("nft add rule inet admin early tcp dport 25 drop")
        found = find_earlier(sh("nft -y list ruleset"), PLAN.table, hooks)
        assert found is not None
        assert (found.name, found.hook, found.priority) == ("inet admin early", "forward", -150)
        sh("nft 'flush chain inet admin early; delete chain inet admin early'")


@private_network
async def test_a_foreign_chain_that_drops_some_packets_is_left_alone():
    sh(f"nft -f - <<'END'\n{SELECTIVE}\nEND")
    async with one_machine() as (network, guest):
        assert await guest.tcp(SERVER)
        assert (await network.observe()).rules.tagged == 0
        assert await network.ensure() is False


@private_network
async def test_a_foreign_chain_that_comes_later_is_noticed():
    async with one_machine() as (network, guest):
        assert await guest.tcp(SERVER)
        sh(f"nft -f - <<'END'\n{DOCKER}\nEND")
        assert await guest.is_refused(SERVER)
        assert await network.ensure() is True
        assert await guest.tcp(SERVER)
        sh("nft flush chain ip filter FORWARD")
        assert await guest.is_refused(SERVER)
        assert await network.ensure() is True
        assert await guest.tcp(SERVER)
        sh("nft 'chain ip filter FORWARD { policy accept; }'")
        assert await network.ensure() is True
        assert (await network.observe()).rules.tagged == 0
        assert await guest.tcp(SERVER)


async def check(rules: str, blocking: int) -> None:
    sh(f"nft -f - <<'END'\n{rules}\nEND")
    before = snapshot_of_host()["nft list ruleset"]
    async with one_machine() as (network, guest):
        assert await guest.tcp(SERVER)
        seen = (await network.observe()).rules
        assert len(seen.blocking) == blocking
        assert seen.tagged == 2 * blocking
        assert await network.ensure() is False
        with pytest.raises(OSError, match=r".*"):
            await guest.tcp("192.168.77.1")
        await network.close()
        await network.sweep(set())
    assert without_counts(snapshot_of_host()["nft list ruleset"]) == without_counts(before)


def without_counts(rules: str) -> list[str]:
    return [line.split("counter")[0] for line in rules.splitlines()]
