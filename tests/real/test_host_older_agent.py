"""Machines whose agent is of the release before, under this release's daemon: they work, and are taken over."""

import os

import msgspec
import pytest
from real_host import Guest, Host, make_fence, stdout_of

from fusevm.wire.guest import AgentHealth
from previous_agent import PROTOCOL

pytestmark = pytest.mark.real

FENCE = make_fence()


async def test_the_life_of_a_machine_with_the_previous_agent(older_host: Host):
    host, guest = older_host, Guest(older_host, "m-1", FENCE)
    await host.start()
    assert (await host.create("m-1", FENCE, env={"COLOUR": "blue"})).phase == "running"
    assert await _protocol(guest) == PROTOCOL
    assert await guest.shell("echo $COLOUR; hostname") == "blue\nbox\n"
    failed = await guest.exec("sh", "-c", "cat; exit 3", stdin=b"in")
    assert (failed.exit_code, stdout_of(failed)) == (3, b"in")
    data = os.urandom(300_000)
    await guest.ask("PUT", "/files?path=/root/file", data)
    boot_id = await guest.shell("cat /proc/sys/kernel/random/boot_id")

    for end in (host.stop, host.kill):
        await end()
        await host.start()
        machine = await host.machine("m-1")
        assert (machine.phase, machine.generation) == ("running", 1)
        assert await _protocol(guest) == PROTOCOL
        assert await guest.shell("cat /proc/sys/kernel/random/boot_id") == boot_id
        assert await guest.ask("GET", "/files?path=/root/file") == data

    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.machines() == []
    assert await host.stop() == 0


async def _protocol(guest: Guest) -> str:
    return msgspec.json.decode(await guest.ask("GET", "/health"), type=AgentHealth).protocol
