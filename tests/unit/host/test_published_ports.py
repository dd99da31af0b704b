"""Published ports and policies of machines: what the journal reserves, and what is refused."""

import asyncio
import socket

import pytest
from msgspec.structs import replace

from fusevm.host.contract.render import render_body
from fusevm.host.port_rows import PortDraft
from fusevm.host.ports import PortHolder, is_port_free
from fusevm.host.rewiring import check_enforceable
from fusevm.model.errors import (
    BadField,
    CommandFailed,
    Error,
    HostFull,
    HostPortTaken,
    PolicyNotEnforceable,
    PublishedPortExists,
    WrongState,
)
from fusevm.model.machine import Isolation
from fusevm.model.network import Exposure, Network, PublishedPort, Rule, Transport
from fusevm.testing.host_world import SPEC, FakeMeter, World, fence, order, until


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def draft(port_id: str = "web", port: int = 80, **more) -> PortDraft:
    return PortDraft(id=port_id, exposure=Exposure(port=port, **more))


def busy(world: World, *taken: int, last: int = 20_009) -> None:
    """Other programs have these ports of a small range."""
    numbers = replace(world.quarters.numbers(), ports=(20_000, last), is_port_free=lambda _, port: port not in taken)
    world.quarters.numbers = lambda: numbers


async def test_a_port_that_another_program_has_is_passed_over(world):
    busy(world, 20_000, 20_001)
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), None)
        first = await daemon.machines.publish("m-1", None, draft("web"))
        second = await daemon.machines.publish("m-1", None, draft("ssh", 22))
        datagrams = await daemon.machines.publish("m-1", None, draft("dns", 53, protocol=Transport.UDP))
        assert (first.host_port, second.host_port) == (20_002, 20_003)
        assert datagrams.host_port == 20_002, "a number is taken for one protocol only"
        assert world.quarters.rewired["m-1"].ports == (first, second, datagrams)


async def test_a_port_of_the_callers_choice_is_given_or_refused(world):
    busy(world, 20_004)
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), None)
        chosen = await daemon.machines.publish("m-1", None, draft("web", host_port=20_007))
        assert chosen.host_port == 20_007
        for taken in (20_004, 20_007):
            with pytest.raises(HostPortTaken):
                await daemon.machines.publish("m-1", None, draft("other", host_port=taken))
        with pytest.raises(BadField, match="20000 to 20009"):
            await daemon.machines.publish("m-1", None, draft("other", host_port=22))
        assert daemon.machines.record("m-1").ports == (chosen,)


async def test_publishing_is_idempotent_by_id_and_ids_are_unique_on_the_host(world):
    async with world.daemon() as daemon:
        for machine_id in ("m-1", "m-2"):
            await daemon.machines.create(order(machine_id), None)
        port = await daemon.machines.publish("m-1", None, draft("web"))
        assert await daemon.machines.publish("m-1", None, draft("web")) == port
        for machine_id, other in (("m-2", draft("web")), ("m-1", draft("web", 81))):
            with pytest.raises(PublishedPortExists):
                await daemon.machines.publish(machine_id, None, other)
        with pytest.raises(BadField, match="another machine"):
            await daemon.machines.unpublish("m-2", None, "web")
        await daemon.machines.unpublish("m-1", None, "web")
        await daemon.machines.unpublish("m-1", None, "web")
        assert daemon.machines.record("m-1").ports == ()
        assert world.quarters.rewired["m-1"].ports == ()
        assert (await daemon.machines.publish("m-2", None, draft("web"))).host_port == port.host_port


async def test_many_machines_publish_at_once_and_no_port_is_given_twice(world):
    async with world.daemon() as daemon:
        specs = [replace(SPEC, expose=(Exposure(port=80), Exposure(port=443))) for _ in range(8)]
        made = await asyncio.gather(
            *(daemon.machines.create(order(f"m-{n}", spec), None) for n, spec in enumerate(specs))
        )
        ports = [port.host_port for machine in made for port in machine.ports]
        assert sorted(ports) == list(range(20_000, 20_016))


async def test_a_full_range_is_a_clear_refusal_without_side_effects(world):
    busy(world, last=20_001)
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1", replace(SPEC, expose=(Exposure(port=80),))), None)
        with pytest.raises(HostFull, match="tcp ports"):
            await daemon.machines.create(order("m-2", replace(SPEC, expose=(Exposure(port=1), Exposure(port=2)))), None)
        assert daemon.machines.ids() == {"m-1"}
        assert (await daemon.machines.publish("m-1", None, draft("web"))).host_port == 20_001


async def test_uses_are_the_machines_and_nobody_asks_for_them_where_nothing_is_published(world):
    world.meter = meter = FakeMeter()
    async with world.daemon() as daemon:
        quiet = await daemon.machines.create(order("m-1"), None)
        assert (await daemon.uses(), meter.asked) == ({}, 0)
        used = await daemon.machines.create(order("m-2", replace(SPEC, expose=(Exposure(port=80),))), None)
        assert await daemon.uses() == {}
        meter.used = {quiet.slot: 1, used.slot: 7, 99: 3}
        assert await daemon.uses() == {"m-2": 7}
        meter.problem = CommandFailed(command="nft", exit_status=1, stderr="no")
        assert await daemon.uses() == {"m-2": 0}, "unknown is not unused"
        body = render_body(used, None, 7)
        assert (body["ports_used_s_ago"], "ports_used_s_ago" in render_body(used)) == (7, False)


async def test_ports_are_kept_while_stopped_and_over_a_restart_and_go_with_the_machine(world):
    async with world.daemon() as daemon:
        made = await daemon.machines.create(
            order("m-1", replace(SPEC, expose=(Exposure(port=80, name="web"),))), fence()
        )
        assert made.ports[0].id == "m-1-tcp-80"
        await daemon.machines.create(order("m-2"), None)
    async with world.daemon() as daemon:
        assert daemon.machines.record("m-1").ports == made.ports
        await daemon.machines.stop("m-1", fence())
        assert daemon.machines.record("m-1").ports == made.ports
        with pytest.raises(WrongState):
            await daemon.machines.publish("m-1", fence(), draft("more"))
        assert (await daemon.machines.publish("m-2", None, draft("web"))).host_port == made.ports[0].host_port + 1
        assert (await daemon.machines.start("m-1", fence())).ports == made.ports
        await daemon.machines.delete("m-1", fence())
        assert (await daemon.machines.publish("m-2", None, draft("again"))).host_port == made.ports[0].host_port


async def test_what_cannot_be_forwarded_is_not_published(world):
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), None)
        world.quarters.rewire_error = CommandFailed(command="nft", exit_status=1, stderr="no")
        with pytest.raises(CommandFailed):
            await daemon.machines.publish("m-1", None, draft("web"))
        assert daemon.machines.record("m-1").ports == ()
        world.quarters.rewire_error = None
        assert (await daemon.machines.publish("m-1", None, draft("web"))).host_port == 20_000


REFUSED = CommandFailed(command="nft", exit_status=1, stderr="no")


@pytest.mark.parametrize("error", [REFUSED, OSError(5, "Input/output error")])
async def test_what_the_host_refuses_is_tried_again_until_it_is_as_the_record_says(world, error):
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), None)
        await daemon.machines.publish("m-1", None, draft("web"))
        closed = Network(internet=False)
        world.quarters.rewire_error = error
        with pytest.raises(Error):
            await daemon.machines.set_network("m-1", None, closed)
        with pytest.raises(Error):
            await daemon.machines.unpublish("m-1", None, "web")
        with pytest.raises(Error):
            await daemon.machines.publish("m-1", None, draft("ssh", 22))
        assert "m-1" in daemon.machines.quarantined()
        # What else is ordered meanwhile changes nothing about that.
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        world.quarters.rewire_error = None
        await until(lambda: daemon.machines.quarantined() == {})
        record = world.quarters.rewired["m-1"]
        assert (record.spec.network, record.ports) == (closed, ())
        assert record == daemon.machines.record("m-1")
        assert "m-1" in world.driver.processes


async def test_a_refused_change_of_a_machine_that_is_stopped_since_is_nobodys_work(world):
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), None)
        world.quarters.rewire_error = REFUSED
        with pytest.raises(CommandFailed):
            await daemon.machines.set_network("m-1", None, Network(internet=False))
        # It will be connected as its record says.
        await daemon.machines.stop("m-1", None)
        await until(lambda: daemon.machines.quarantined() == {})
        with pytest.raises(WrongState):
            await daemon.machines.publish("m-1", None, draft("web"))
        assert daemon.machines.quarantined() == {}


async def test_a_change_that_was_not_accepted_leaves_nothing_to_do(world):
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), None)
        world.quarters.rewire_error = REFUSED
        with pytest.raises(BadField):
            await daemon.machines.set_network("m-1", None, Network(rules=(Rule(cidr="10.0.0.0/8"),)))
        assert daemon.machines.quarantined() == {}


async def test_a_change_of_policy_is_in_the_journal_and_a_repeated_create_is_none(world):
    policy = Network(internet=False, rules=(Rule(domain="Example.ORG", ports=(443,)),))
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), fence())
        changed = await daemon.machines.set_network("m-1", fence(action_seq=2), policy)
        assert changed.spec.network.rules[0].domain == "example.org"
        assert world.quarters.rewired["m-1"].spec.network == changed.spec.network
        with pytest.raises(BadField, match="would say nothing"):
            await daemon.machines.set_network("m-1", fence(action_seq=2), replace(policy, internet=True))
    async with world.daemon() as daemon:
        assert daemon.machines.record("m-1").spec.network == changed.spec.network


def test_what_a_user_network_cannot_enforce_is_refused():
    check_enforceable(Network(internet=False), Isolation.USER_NETWORK)
    for policy in (Network(internet=False, rules=(Rule(cidr="1.1.1.1"),)), Network(egress_kbit=1000)):
        check_enforceable(policy, Isolation.NAMESPACE)
        with pytest.raises(PolicyNotEnforceable, match="root"):
            check_enforceable(policy, Isolation.USER_NETWORK)


def test_a_port_is_held_silently_until_it_is_let_go():
    (port,) = _free_ports(1)
    published = PublishedPort(id="p", port=80, host_port=port)
    holder = PortHolder()
    assert holder.hold("m-1", [published]) == []
    assert holder.hold("m-1", [published]) == []
    assert not is_port_free(Transport.TCP, port)
    assert is_port_free(Transport.UDP, port)
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(("127.0.0.1", port))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            server.bind(("127.0.0.1", port))
    holder.hold("m-1", [])
    assert is_port_free(Transport.TCP, port)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(HostPortTaken):
        holder.hold_all("m-2", [published])
    holder.hold_all("m-2", [published])
    holder.close()
    assert is_port_free(Transport.TCP, port)


def _free_ports(count: int) -> list[int]:
    found = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in found]
    for server in found:
        server.close()
    return ports
