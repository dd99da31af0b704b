"""Pinned addresses of many machines in one table: none of them can take the others' names away."""

import asyncio
from collections.abc import Sequence
from ipaddress import IPv4Address

import pytest
from namespaces import private_network
from network_lab import PLAN, sh

from fusevm.host.net import firewall as firewall_module
from fusevm.host.net.firewall import Firewall
from fusevm.host.net.nft import Json
from fusevm.host.net.plan import plan_slot
from fusevm.host.net.terms import Forward, Terms
from fusevm.host.net.transaction import apply_transaction
from fusevm.host.net.verdicts import MAX_PINS, pin_set
from fusevm.model.errors import CommandFailed
from fusevm.model.network import Network, Rule, Transport, check_network

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


@private_network
async def test_nobody_is_told_that_he_may_before_the_kernel_lets_him(monkeypatch: pytest.MonkeyPatch):
    firewall = await opened()
    begun, may_go_on = asyncio.Event(), asyncio.Event()

    async def hold(commands: Sequence[Json]) -> None:
        begun.set()
        await may_go_on.wait()
        await apply_transaction(commands)

    monkeypatch.setattr(firewall_module, "apply_transaction", hold)
    first = asyncio.create_task(firewall.pin(0, [MINE], addresses(0, 1), LIFETIME_S))
    await begun.wait()
    second = asyncio.create_task(firewall.pin(0, [MINE], addresses(0, 1), LIFETIME_S))
    for _ in range(9):
        await asyncio.sleep(0)
    assert not second.done()
    may_go_on.set()
    assert (await first, await second) == (True, True)


@private_network
async def test_what_is_refused_to_one_machine_spoils_no_change_of_another():
    firewall, slots = await opened(), [plan_slot(PLAN, index) for index in range(3)]
    web = Forward(protocol=Transport.TCP, host_port=20_000, port=80)
    await firewall.admit([slots[1]], Terms(policy=terms(THEIRS).policy, forwards=frozenset({web})))
    assert await firewall.pin(0, [MINE], addresses(0, 1), LIFETIME_S)
    # A port of the host leads to one machine.
    taken = Terms(forwards=frozenset({Forward(protocol=Transport.TCP, host_port=20_000, port=81)}))
    for slot in (slots[0], slots[2]):
        with pytest.raises(CommandFailed, match="File exists"):
            await firewall.admit([slot], taken)
    assert [firewall.terms(index) for index in (0, 2)] == [terms(MINE), None]
    assert "8.0.0.0" in sh(f"nft list set inet {PLAN.table} {pin_set(slots[0], MINE)}")
    before = handle()
    await firewall.admit([slots[1]], Terms())
    await firewall.admit([slots[2]], taken)
    assert handle() == before, "a small change is enough again"
    assert (await firewall.observe()).forwards == frozenset({(slots[2].address, next(iter(taken.forwards)))})
