"""The daemon is killed (SIGKILL) at random moments of creates and deletes; its next run puts everything right.

The moments are spread over the whole operations, with a seed that is printed; FUSE_TEST_SEED repeats a run. What the
named kill points (`test_host_crashes.py`) miss lies between them: in threads, in programs that are called, in QEMU.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Coroutine
from typing import Any

import pytest
from real_host import Guest, Host, make_fence, reason_of, until

from fusevm.model.errors import Error
from fusevm.wire.host_api import MachineBody, MachineList

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

#: Machines; each is killed in its create and in its delete.
MACHINES = 10
SPEC = {"image": "bare", "memory_mib": 128}
#: An operation takes a different time each time: some moments may lie behind its end.
_BEYOND = 1.05


class Rounds:
    """One data directory, and who was killed when."""

    def __init__(self, host: Host, seed: int) -> None:
        self.host = host
        self.random = random.Random(seed)
        #: How long operations take that nobody disturbs.
        self.usual_s: dict[str, float] = {}
        #: What happened, for people.
        self.told: list[str] = []

    def moments(self) -> list[float]:
        """Random parts of an operation, one in each tenth, in random order."""
        parts = [_BEYOND * (number + self.random.random()) / MACHINES for number in range(MACHINES)]
        self.random.shuffle(parts)
        return parts

    async def measure(self, name: str, order: Awaitable[object]) -> None:
        """Note how long an operation takes when nobody is killed."""
        began = time.monotonic()
        await order
        self.usual_s[name] = time.monotonic() - began
        self.told.append(f"{name} takes {self.usual_s[name]:.3f} s")

    async def kill_during(self, name: str, order: Coroutine[Any, Any, object], part: float) -> bool:
        """Kill the daemon when part of the usual time of an order is over; was the order answered before?"""
        began, delay_s = time.monotonic(), part * self.usual_s[name]
        ordered = asyncio.create_task(order)
        await asyncio.wait({ordered}, timeout=delay_s)
        passed_s = time.monotonic() - began
        await self.host.kill()
        (outcome,) = await asyncio.gather(ordered, return_exceptions=True)
        assert not isinstance(outcome, Error), f"{name} after {delay_s:.3f} s: {outcome}"
        is_answered = not isinstance(outcome, BaseException)
        if is_answered:
            # It was quicker than usual: spread the next moments over less.
            self.usual_s[name] = min(self.usual_s[name], passed_s)
        self.told.append(f"{name} {passed_s:.3f} s{' (answered)' if is_answered else ''}")
        await self.host.start()
        return is_answered

    async def settled(self) -> list[MachineBody]:
        """The machines, once nothing is under way any more."""

        async def is_settled() -> bool:
            entries = json.loads(await self.host.ask("GET", "/state"))["journal"]["entries"]
            return not any(entry["operation"] for entry in entries)

        await until(is_settled, 60)
        return await self.host.machines()

    async def tombstones(self) -> int:
        listed = json.loads(await self.host.ask("GET", "/machines"))
        assert set(listed) <= set(MachineList.__struct_fields__)
        return listed["tombstones"]


async def check_one(host: Host, machine: MachineBody, machine_id: str, uid: str) -> None:
    """It is the one that was ordered, it works, and there is one VMM."""
    assert (machine.id, machine.uid, machine.incarnation, machine.generation) == (machine_id, uid, 1, 1)
    assert machine.phase == "running"
    assert (await Guest(host, machine_id, make_fence(uid)).exec("tool", "version")).exit_code == 0
    assert len([line for line in host.leftovers() if line.startswith("process")]) == 1


async def test_twenty_random_moments(bare_host: Host):
    seed = int(os.environ.get("FUSE_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"FUSE_TEST_SEED={seed}")
    host, rounds = bare_host, Rounds(bare_host, seed)
    await host.start()
    await rounds.measure("create", host.create("m-usual", make_fence("usual"), **SPEC))
    await rounds.measure("delete", host.delete("m-usual", make_fence("usual", action_seq=2)))
    try:
        for number, (in_create, in_delete) in enumerate(zip(rounds.moments(), rounds.moments(), strict=True)):
            await _live(rounds, f"m-{number}", f"u{number}", in_create, in_delete)
            # With the one before.
            assert await rounds.tombstones() == number + 2
    finally:
        print("\n".join(rounds.told))
    assert await host.stop() == 0


async def _live(rounds: Rounds, machine_id: str, uid: str, in_create: float, in_delete: float) -> None:
    """The life of a machine whose daemon dies twice."""
    host, first, second = rounds.host, make_fence(uid), make_fence(uid, action_seq=2)
    is_answered = await rounds.kill_during("create", host.create(machine_id, first, **SPEC), in_create)
    machines = await rounds.settled()
    if machines:
        await check_one(host, machines[0], machine_id, uid)
    else:
        assert not is_answered, "a machine whose create was answered is gone"
        await until(lambda: host.leftovers() == [])
    # Whoever got no answer asks again, and gets the machine.
    made = await host.create(machine_id, first, **SPEC)
    assert machines in ([], [made])
    await check_one(host, made, machine_id, uid)

    is_answered = await rounds.kill_during("delete", host.delete(machine_id, second), in_delete)
    machines = await rounds.settled()
    if machines:
        assert not is_answered, "a machine whose delete was answered is there"
        await check_one(host, machines[0], machine_id, uid)
    else:
        await until(lambda: host.leftovers() == [])
    await host.delete(machine_id, second)
    # The create of before, arriving late, finds a tombstone.
    assert await reason_of(host.create(machine_id, first, **SPEC)) == "stale_incarnation"
    assert await host.machines() == []
    await until(lambda: host.leftovers() == [])
