"""Network policy and published ports of environments over the API, against a host that only remembers them."""

from collections.abc import Awaitable, Callable

import pytest
from control_harness import running, until

from fusevm.model.errors import CommandFailed, HostUnreachable
from fusevm.model.network import Network, Rule
from fusevm.testing.fake_host import FakeHost, lose_reply

RULES = [{"domain": "PyPI.org", "ports": [443]}, {"action": "deny", "cidr": "192.0.2.7/24", "protocol": "udp"}]
NORMAL = [{"domain": "pypi.org", "ports": [443]}, {"action": "deny", "cidr": "192.0.2.0/24", "protocol": "udp"}]
URL = "/v1/environments/fuse-t/network"


def ordered(host: FakeHost) -> Network:
    """What the host was told of its one machine."""
    (machine,) = host.table.values()
    return machine.spec.network


async def test_a_policy_is_checked_echoed_and_ordered_from_the_host() -> None:
    host = FakeHost()
    async with running(host) as server:
        made = await server.create(task_id="t", network={"internet": False, "rules": RULES, "egress_kbit": 1000})
        assert made["network"] == {"internet": False, "rules": NORMAL, "egress_kbit": 1000}
        assert ordered(host).rules[0] == Rule(domain="pypi.org", ports=(443,))
        assert (await server.http.get("/v1/environments/fuse-t")).json()["network"] == made["network"]


@pytest.mark.parametrize(
    ("asked", "in_force"),
    [
        (None, {"internet": True}),
        ({}, {"internet": True}),
        ({"internet": False}, {"internet": False}),
        ({"rules": [{"domain": "a.org"}]}, {"internet": False, "rules": [{"domain": "a.org"}]}),
        ({"rules": [{"action": "deny", "ports": [25]}]}, {"internet": True}),
    ],
)
async def test_whoever_allows_something_does_not_mean_everything(asked: object, in_force: dict[str, object]) -> None:
    async with running() as server:
        made = await server.create(network=asked)
        assert made["network"]["internet"] is in_force["internet"]
        if "rules" in in_force:
            assert made["network"]["rules"] == in_force["rules"]


@pytest.mark.parametrize(
    ("network", "field"),
    [
        ({"internet": True, "rules": [{"domain": "a.org"}]}, "network.internet"),
        ({"rules": [{"domain": "a.org", "action": "deny"}]}, "network.rules[0].domain"),
        ({"rules": [{}, {"cidr": "10.0.0.0/8"}]}, "network.rules[1].cidr"),
        ({"rules": [{"cidr": "2001:db8::/32"}]}, "network.rules[0].cidr"),
        ({"rules": [{"cidr": "9.9.9.9", "ports": [53]}]}, "network.rules[0].ports"),
        ({"rules": [{"protocol": "icmp", "ports": [1]}]}, "network.rules[0].ports"),
        ({"rules": [{"ports": ["9-1"]}]}, "network.rules[0].ports"),
        ({"rules": [{"domain": "a.org", "cidr": "1.1.1.1"}]}, "network.rules[0]"),
        ({"rules": [{"domain": "*.org"}]}, "network.rules[0].domain"),
        ({"egress_kbit": -1}, "network.egress_kbit"),
        ({"rules": [{}] * 65}, "network.rules"),
    ],
)
async def test_what_cannot_be_held_is_refused_by_name(network: dict[str, object], field: str) -> None:
    async with running() as server:
        answer = await server.http.post("/v1/environments", json={"task_id": "t", "network": network})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["details"]["field"] == field


async def test_exposed_ports_are_published_and_the_daemons_is_the_url() -> None:
    host = FakeHost()
    async with running(host) as server:
        made = await server.create(
            task_id="t",
            expose=[{"port": 80, "as": "web"}, {"port": 53, "protocol": "udp"}],
            agent={"command": ["serve"], "port": 9000},
        )
        urls = {entry["port"]: entry["url"] for entry in made["endpoints"]}
        assert made["endpoints"][:2] == [
            {"as": "web", "url": "127.0.0.1:20000", "port": 80, "protocol": "tcp"},
            {"url": "127.0.0.1:20001", "port": 53, "protocol": "udp"},
        ]
        assert made["url"] == urls[9000]
        assert (await server.create(task_id="plain"))["url"] == ""
        await server.http.delete("/v1/environments/fuse-t")
        ended = (await server.http.get(f"/v1/environments/fuse-t?uid={made['uid']}")).json()
        assert (ended["url"], "endpoints" in ended) == ("", False)


@pytest.mark.parametrize(
    ("expose", "field"),
    [
        ([{"port": 0}], "expose[0].port"),
        ([{"port": 80}, {"port": 80, "as": "other"}], "expose[1]"),
        ([{"port": 80, "host_port": 70_000}], "expose[0].host_port"),
    ],
)
async def test_ports_that_cannot_be_are_refused_by_name(expose: list[object], field: str) -> None:
    async with running() as server:
        answer = await server.http.post("/v1/environments", json={"task_id": "t", "expose": expose})
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, field)


async def test_a_running_environment_is_held_to_another_policy() -> None:
    host = FakeHost()
    async with running(host) as server:
        await server.create(task_id="t")
        answer = await server.http.put(URL, json={"rules": RULES})
        assert answer.status_code == 200, answer.text
        assert answer.json()["network"] == {"internet": False, "rules": NORMAL}
        assert ordered(host).internet is False
        again = await server.http.put(URL, json={"internet": True})
        assert again.json()["network"] == {"internet": True}
        assert ordered(host) == Network()


async def test_a_lost_reply_to_a_change_is_asked_for_again() -> None:
    host = FakeHost()
    async with running(host) as server:
        await server.create(task_id="t")
        host.script("set_network", lose_reply, HostUnreachable(id="h", problem="away"))
        answer = await server.http.put(URL, json={"internet": False})
        assert (answer.status_code, answer.json()["network"]) == (200, {"internet": False})
        assert ordered(host).internet is False


async def test_what_the_host_refuses_changes_nothing() -> None:
    host = FakeHost()
    async with running(host) as server:
        await server.create(task_id="t")
        host.script("set_network", CommandFailed(command="nft", exit_status=1, stderr="no"))
        answer = await server.http.put(URL, json={"internet": False})
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (500, "command_failed")
        shown = (await server.http.get("/v1/environments/fuse-t")).json()
        assert (shown["network"], shown["state"]) == ({"internet": True}, "running")
        await until(lambda: host.count("set_network") == 2)
        bad = await server.http.put(URL, json={"rules": [{"cidr": "x"}]})
        assert bad.json()["error"]["details"]["field"] == "network.rules[0].cidr"


async def test_a_change_that_fails_after_the_host_has_made_it_is_put_back() -> None:
    host = FakeHost()
    async with running(host) as server:
        await server.create(task_id="t")
        no = CommandFailed(command="nft", exit_status=1, stderr="no")
        host.script("set_network", lose_reply, no, no, no)
        answer = await server.http.put(URL, json={"internet": False})
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (500, "command_failed")
        env = await server.plane.store.live("t")
        assert env is not None

        async def told() -> list[str]:
            return [stored.fact.reason for stored in await server.plane.store.facts_of(env.uid, 0, 100)]

        await until(lambda: _ends_with(told, "command_failed", "network_put_back"))
        assert ordered(host) == Network()
        shown = (await server.http.get("/v1/environments/fuse-t")).json()
        assert (shown["network"], shown["state"]) == ({"internet": True}, "running")


async def _ends_with(told: Callable[[], Awaitable[list[str]]], *reasons: str) -> bool:
    return (await told())[-len(reasons) :] == [*reasons]
