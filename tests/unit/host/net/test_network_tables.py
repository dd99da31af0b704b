"""Rules against golden files; FUSE_UPDATE_GOLDEN=1 writes them anew. The system tests give them to a kernel."""

import os
from pathlib import Path

import msgspec

from fusevm.host.net.limits import render_limits, render_limits_removal, render_new_limits
from fusevm.host.net.links import Objects, render_creation, render_inside, render_removal
from fusevm.host.net.nft import render_document
from fusevm.host.net.plan import NetworkPlan, plan_slot
from fusevm.host.net.tables import (
    USE_MEMORY_S,
    render_host_table,
    render_host_table_removal,
    render_machines,
    render_machines_removal,
    render_namespace_tables,
    render_terms_change,
)
from fusevm.host.net.terms import Forward, Terms
from fusevm.host.net.verdicts import pin_set
from fusevm.model.network import Network, Protocol, Rule, Transport, Verdict, check_network, is_denied

GOLDEN = Path(__file__).parent / "golden"
PLAN = NetworkPlan()
ONLINE, OFFLINE = Terms(), Terms(policy=Network(internet=False))
NOTHING = Objects(namespaces=frozenset(), stubs=frozenset(), veths=frozenset())


def check_golden(name, text):
    path = GOLDEN / name
    if os.environ.get("FUSE_UPDATE_GOLDEN") == "1":
        path.write_bytes(text)
    assert text == path.read_bytes()


def pretty(commands):
    lines = [msgspec.json.encode(command) for command in commands]
    return b"\n".join(lines) + b"\n"


def test_the_host_table():
    machines = [(plan_slot(PLAN, 0), ONLINE), (plan_slot(PLAN, 1), OFFLINE)]
    check_golden("host_table.jsonl", pretty(render_host_table(PLAN, ["eth0", "eth1"], machines)))


def test_uses_are_kept_by_another_table_where_there_are_ports():
    slots = [plan_slot(PLAN, index) for index in range(3)]
    forward = Forward(protocol=Transport.TCP, host_port=20_000, port=80)
    terms = [Terms(forwards=frozenset({forward})), Terms(forwards=frozenset({forward})), ONLINE]
    uses = {0: 60, 1: USE_MEMORY_S, 2: 60, 9: 60}
    *_, last = render_host_table(PLAN, [], zip(slots, terms, strict=True), uses=uses)
    assert last["add"]["element"]["name"] == "used"
    assert last["add"]["element"]["elem"] == [{"elem": {"val": slots[0].veth, "timeout": USE_MEMORY_S - 60}}]


def test_the_tables_inside_a_namespace():
    check_golden("namespace_tables.jsonl", pretty(render_namespace_tables(plan_slot(PLAN, 1))))


def test_the_table_that_limits_connections():
    commands = render_new_limits(PLAN)
    check_golden("limits_table.jsonl", pretty([*commands, *render_limits_removal(PLAN)]))
    again = render_limits(PLAN)
    assert [command for command in again if "add" in command] == [
        command for command in commands if "rule" in command.get("add", {})
    ]
    assert not any("delete" in command or "set" in command.get("flush", {}) for command in again), "counts stay"


def test_the_life_of_a_machine_is_elements_only():
    online, offline = (plan_slot(PLAN, 7), ONLINE), (plan_slot(PLAN, 8), OFFLINE)
    commands = [
        *render_machines(PLAN, [online, offline]),
        *render_terms_change(PLAN, online[0], ONLINE, OFFLINE),
        *render_terms_change(PLAN, online[0], OFFLINE, ONLINE),
        *render_machines_removal(PLAN, [online, offline]),
    ]
    check_golden("machines.jsonl", pretty(commands))
    assert all("element" in next(iter(command.values())) for command in commands)


def test_rules_are_chains_of_the_machines_own():
    rules = (
        Rule(action=Verdict.DENY, cidr="192.0.2.0/24", protocol=Protocol.UDP),
        Rule(domain="*.example.org", ports=(443, "8000-8100")),
    )
    policy = check_network(Network(internet=False, rules=rules))
    slot = plan_slot(PLAN, 7)
    forward = Forward(protocol=Transport.TCP, host_port=20_000, port=80)
    full = Terms(policy=policy, forwards=frozenset({forward}))
    fewer = Terms(policy=check_network(Network(internet=False, rules=rules[:1])))
    commands = [
        *render_machines(PLAN, [(slot, full)], {pin_set(slot, policy.rules[1]): {"198.51.100.1": 60}}),
        *render_terms_change(PLAN, slot, full, fewer),
        *render_terms_change(PLAN, slot, fewer, ONLINE),
        *render_machines_removal(PLAN, [(slot, full)]),
    ]
    check_golden("rules.jsonl", pretty(commands))


def test_no_machines_are_no_commands():
    assert render_machines(PLAN, []) == []
    assert render_machines_removal(PLAN, []) == []


def test_only_elements_grow_with_the_machines():
    def rest(count):
        commands = render_host_table(PLAN, ["eth0"], [(plan_slot(PLAN, n), ONLINE) for n in range(count)])
        return [command for command in commands if "element" not in command.get("add", {})]

    assert rest(0) == rest(1000)


def test_a_public_range_is_denied_to_machines_too():
    commands = render_host_table(NetworkPlan(range="198.51.0.0/16"), [], [])
    text = render_document(commands)
    assert b'{"addr":"198.51.0.0","len":16}' in text
    wide = render_document(render_host_table(NetworkPlan(range="172.0.0.0/8"), [], []))
    assert b'"172.16.0.0"' not in wide, "an interval set takes no overlapping elements"


PRIVATE = """0.0.0.0 10.1.2.3 100.64.0.1 100.127.255.255 127.0.0.1 169.254.169.254 172.16.0.1 172.31.255.255
    192.168.1.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 198.18.0.1 192.0.0.192 168.63.129.16
    100.100.100.200"""
PUBLIC = "1.1.1.1 9.9.9.9 100.128.0.1 172.32.0.1 192.167.1.1 223.255.255.1 11.0.0.1"


def test_private_special_and_metadata_addresses_are_denied():
    assert [address for address in PRIVATE.split() if not is_denied(address)] == []


def test_the_internet_is_not_denied():
    assert [address for address in PUBLIC.split() if is_denied(address)] == []


def test_a_transaction_is_one_document():
    document = msgspec.json.decode(render_document(render_host_table_removal(PLAN)))
    table = {"table": {"family": "inet", "name": "fuse_fuse"}}
    assert document == {"nftables": [{"add": table}, {"delete": table}]}


def test_creation_leaves_out_what_exists():
    slots = [plan_slot(PLAN, 0), plan_slot(PLAN, 1)]
    some = Objects(namespaces=frozenset({0, 1}), stubs=frozenset(), veths=frozenset({0}))
    check_golden("creation.ip", (render_creation(slots, NOTHING) + render_inside(slots[1])).encode())
    assert "netns add" not in render_creation(slots, some)
    assert render_creation(slots, some).count("link add") == 1


def test_removal_names_only_what_exists_and_takes_the_veths_together():
    some = Objects(namespaces=frozenset({1, 3}), stubs=frozenset({4}), veths=frozenset({1, 2, 9}))
    assert render_removal(PLAN, [1, 2, 3, 4, 5], some, group=77).splitlines() == [
        "link set fuse-v1 group 77",
        "link set fuse-v2 group 77",
        "link del group 77",
        "netns del fuse-1",
        "netns del fuse-3",
        "netns del fuse-4",
    ]
    assert render_removal(PLAN, [5], some, group=77) == ""
    assert "link del" not in render_removal(PLAN, [4], some, group=77)
