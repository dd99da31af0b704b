"""Pinned addresses of many machines in one table: none of them can take the others' names away."""

import asyncio
from ipaddress import IPv4Address

from namespaces import private_network
from network_lab import PLAN, sh

from fusevm.host.net.firewall import Firewall
from fusevm.host.net.plan import plan_slot
from fusevm.host.net.terms import Terms
from fusevm.host.net.verdicts import MAX_PINS, pin_set
from fusevm.model.network import Network, Rule, check_network

MINE, THEIRS = Rule(domain="*.mine.example"), Rule(domain="theirs.example")
LIFETIME_S = 300


def terms(rule: Rule) -> Terms:
    return Terms(policy=check_network(Network(internet=False, rules=(rule,))))


def addresses(first: int, count: int) -> list[str]:
    return [str(IPv4Address("8.0.0.0") + number) for number in range(first, first + count)]


def handle() -> str:
    """Of the table: another one once it was made anew."""
    return sh(f"nft -a list table inet {PLAN.table} | grep '^table'")


async def opened() -> Firewall:
    firewall = Firewall(PLAN)
    await firewall.open([], {0: terms(MINE), 1: terms(THEIRS)})
    return firewall


@private_network
async def test_a_full_set_is_refused_alone_and_the_table_stays():
    firewall = await opened()
    before = handle()
    assert await firewall.pin(0, [MINE], addresses(0, MAX_PINS), LIFETIME_S)
    mine, theirs = await asyncio.gather(
        firewall.pin(0, [MINE], addresses(MAX_PINS, 1), LIFETIME_S),
        firewall.pin(1, [THEIRS], addresses(0, 1), LIFETIME_S),
    )
    assert (mine, theirs) == (False, True)
    assert handle() == before
    assert "8.0.0.0" in sh(f"nft list set inet {PLAN.table} {pin_set(plan_slot(PLAN, 1), THEIRS)}")


@private_network
async def test_what_the_kernel_refuses_one_machine_is_not_refused_another():
    firewall = await opened()
    before = handle()
    sh(f"nft flush chain inet {PLAN.table} out_0")
    sh(f"nft delete set inet {PLAN.table} {pin_set(plan_slot(PLAN, 0), MINE)}")
    # Both wait for the one that is under way, and share the next transaction.
    first, mine, theirs = await asyncio.gather(
        firewall.pin(1, [THEIRS], addresses(0, 1), LIFETIME_S),
        firewall.pin(0, [MINE], addresses(1, 1), LIFETIME_S),
        firewall.pin(1, [THEIRS], addresses(2, 1), LIFETIME_S),
    )
    assert (first, mine, theirs) == (True, False, True)
    assert handle() == before


@private_network
async def test_who_gives_up_takes_no_pins_from_others():
    firewall = await opened()
    leader = asyncio.create_task(firewall.pin(0, [MINE], addresses(0, 1), LIFETIME_S))
    follower = asyncio.create_task(firewall.pin(1, [THEIRS], addresses(0, 1), LIFETIME_S))
    await asyncio.sleep(0)
    leader.cancel()
    assert await follower
    assert "8.0.0.0" in sh(f"nft list set inet {PLAN.table} {pin_set(plan_slot(PLAN, 1), THEIRS)}")
    assert await firewall.pin(0, [MINE], addresses(0, 1), LIFETIME_S)
