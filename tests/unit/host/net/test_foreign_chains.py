import msgspec
import pytest

from fusevm.host.net.foreign import (
    count_tagged,
    find_blocking_chains,
    parse_ruleset,
    render_passage,
    render_passage_removal,
)
from fusevm.host.net.plan import NetworkPlan

PLAN = NetworkPlan()
DROP, ACCEPT, REJECT, COUNTER = {"drop": None}, {"accept": None}, {"reject": {}}, {"counter": {"packets": 0}}
SOME = {"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "docker0"}}


def jump(target):
    return {"jump": {"target": target}}


def goto(target):
    return {"goto": {"target": target}}


def listing(*, policy="accept", rules=(), others=None, family="ip", hook="forward", table="filter"):
    place = {"family": family, "table": table}
    lines = [{"metainfo": {"version": "1.0.6"}}, {"table": {"family": family, "name": table}}]
    lines.append({"chain": {**place, "name": "FORWARD", "hook": hook, "prio": 0, "type": "filter", "policy": policy}})
    for name, chain_rules in {"FORWARD": rules, **(others or {})}.items():
        if name != "FORWARD":
            lines.append({"chain": {**place, "name": name, "handle": 1}})
        for expressions in chain_rules:
            extra = {"comment": "fuse:fuse"} if expressions == "ours" else {}
            body = [{"match": {}}, ACCEPT] if expressions == "ours" else expressions
            lines.append({"rule": {**place, "chain": name, "handle": len(lines), "expr": body, **extra}})
    return parse_ruleset(msgspec.json.encode({"nftables": lines}))


BLOCKING = [
    {"policy": "drop"},
    {"policy": "drop", "family": "inet"},
    {"policy": "drop", "rules": [[SOME, ACCEPT]]},
    {"rules": [[DROP]]},
    {"rules": [[COUNTER, REJECT]]},
    {"rules": [[SOME, ACCEPT], [{"log": {}}, DROP]]},
    {"rules": [[COUNTER, {"xt": None}]]},
    {"rules": [[jump("a")]], "others": {"a": [[SOME, ACCEPT], [REJECT]]}},
    {"rules": [[goto("a")]], "others": {"a": [[jump("b")]], "b": [[DROP]]}},
    {"policy": "drop", "rules": [[goto("a")]], "others": {"a": []}},
    {"policy": "drop", "rules": [[jump("a")]], "others": {"a": [[{"return": None}], [ACCEPT]]}},
    {"policy": "drop", "rules": [[jump("a")]], "others": {"a": [[jump("a")]]}},
]
PASSING = [
    {},
    {"rules": [[SOME, DROP]]},
    {"policy": "drop", "rules": [[ACCEPT]]},
    {"policy": "drop", "hook": "input"},
    {"policy": "drop", "family": "ip6"},
    {"policy": "drop", "table": "fuse_other"},
    {"rules": [[SOME, jump("a")]], "others": {"a": [[DROP]]}},
    {"rules": [[jump("a")]], "others": {"a": [[{"return": None}], [DROP]]}},
    {"rules": [[goto("a")], [DROP]], "others": {"a": []}},
    {"rules": [[{"return": None}], [DROP]]},
    {"rules": [[jump("missing")]]},
]


@pytest.mark.parametrize("chain", BLOCKING)
def test_a_chain_that_drops_what_it_does_not_know_blocks(chain):
    ruleset = listing(**chain)
    assert [found.name for found in find_blocking_chains(ruleset)] == ["FORWARD"]
    commands = render_passage(PLAN, ruleset)
    assert [next(iter(command)) for command in commands] == ["insert", "insert"]
    directions = [command["insert"]["rule"]["expr"][0]["match"] for command in commands]
    assert [match["left"]["meta"]["key"] for match in directions] == ["iifname", "oifname"]
    assert {match["right"] for match in directions} == {"fuse-v*"}


@pytest.mark.parametrize("chain", PASSING)
def test_other_chains_are_left_alone(chain):
    ruleset = listing(**chain)
    assert find_blocking_chains(ruleset) == []
    assert render_passage(PLAN, ruleset) == []


def test_a_passage_that_is_there_is_not_made_again():
    ruleset = listing(policy="drop", rules=["ours", "ours", [SOME, ACCEPT]])
    assert count_tagged(PLAN, ruleset) == 2
    assert render_passage(PLAN, ruleset) == []
    assert [next(iter(command)) for command in render_passage_removal(PLAN, ruleset)] == ["delete", "delete"]


def test_half_a_passage_is_replaced():
    commands = render_passage(PLAN, listing(policy="drop", rules=["ours"]))
    assert [next(iter(command)) for command in commands] == ["delete", "insert", "insert"]


def test_a_passage_that_is_needed_no_more_is_removed():
    commands = render_passage(PLAN, listing(policy="accept", rules=["ours", "ours"]))
    assert [next(iter(command)) for command in commands] == ["delete", "delete"]


def test_the_passage_of_another_instance_is_not_ours():
    ruleset = listing(policy="drop", rules=["ours", "ours"])
    other = NetworkPlan(prefix="other")
    assert count_tagged(other, ruleset) == 0
    assert render_passage_removal(other, ruleset) == []
