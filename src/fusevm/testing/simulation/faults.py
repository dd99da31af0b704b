"""What goes wrong in a simulated cluster, each kind at its own rate, until it is told to end."""

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

from fusevm.testing.simulation.database import Fate, SimDatabase
from fusevm.testing.simulation.host import SimHost
from fusevm.testing.simulation.network import Network
from fusevm.testing.simulation.replica import Replica
from fusevm.testing.simulation.scale import Luck
from fusevm.testing.simulation.trace import Trace

Fault = Callable[[], Awaitable[None]]


class Faults:
    """The bad luck of one cluster. Every fault ends by itself, the loss of a host excepted."""

    def __init__(
        self,
        *,
        hosts: list[SimHost],
        replicas: list[Replica],
        network: Network,
        database: SimDatabase,
        chance: Random,
        trace: Trace,
    ) -> None:
        self._hosts = hosts
        self._replicas = replicas
        self._network = network
        self._database = database
        self._chance = chance
        self._trace = trace
        self.counts: dict[str, int] = {}

    async def happen(self, luck: Luck, for_s: float) -> None:
        """Let things go wrong for so long. On return all is well again but for the hosts that are gone."""
        hosts, replicas = len(self._hosts), len(self._replicas)
        rates: dict[str, tuple[float, Fault]] = {
            "partition": (luck.partitions * hosts, self._cut),
            "daemon crash": (luck.daemon_crashes * hosts, self._crash_daemon),
            "reboot": (luck.reboots * hosts, self._reboot),
            "short list": (luck.short_lists * hosts, self._shorten_list),
            "vmm crash": (luck.vmm_crashes * hosts, self._break_machine),
            "lost host": (luck.lost_hosts * hosts * 60 / for_s, self._lose_host),
            "kill": (luck.kills * replicas, self._kill),
            "restart": (luck.restarts * replicas, self._restart),
            "clock step": (luck.clock_steps * replicas, self._step_clock),
            "stall": (luck.stalls, self._stall),
            "lost commit": (luck.lost_commits, self._lose_commit),
            "outage": (luck.outages, self._take_away),
            "stuck way": (luck.stuck_ways * hosts, self._stick),
            "refusal": (luck.refusals * hosts, self._refuse),
            "stuck machine": (luck.stuck_machines * hosts, self._stop_machine),
        }
        loop = asyncio.get_running_loop()
        until_s = loop.time() + for_s
        async with asyncio.TaskGroup() as group:
            for name, (per_minute, fault) in rates.items():
                if per_minute > 0:
                    group.create_task(self._repeat(group, name, per_minute / 60, fault, until_s))

    async def _repeat(self, group: asyncio.TaskGroup, name: str, per_s: float, fault: Fault, until_s: float) -> None:
        loop = asyncio.get_running_loop()
        while (pause_s := self._chance.expovariate(per_s)) < until_s - loop.time():
            await asyncio.sleep(pause_s)
            self.counts[name] = self.counts.get(name, 0) + 1
            group.create_task(_carry_out(fault))

    # -- hosts and the ways to them -------------------------------------------------------------------------------

    async def _cut(self) -> None:
        replica, host = self._chance.choice(self._replicas), self._chance.choice(self._hosts)
        cut_s = self._chance.choice((2.0, 10.0, 30.0, 100.0)) * self._chance.uniform(0.5, 1.5)
        who = self._replicas if self._chance.random() < 0.3 else [replica]
        self._trace.note(host.id, f"cut off from {', '.join(one.name for one in who)} for {cut_s:.0f} s")
        for one in who:
            self._network.cuts[one.name, host.id] = None
        await asyncio.sleep(cut_s)
        for one in who:
            self._network.cuts.pop((one.name, host.id), None)

    async def _stick(self) -> None:
        replica, host = self._chance.choice(self._replicas), self._chance.choice(self._hosts)
        stuck_s = self._chance.choice((5.0, 40.0, 90.0)) * self._chance.uniform(0.5, 1.5)
        self._trace.note(host.id, f"what {replica.name} sends gets stuck for {stuck_s:.0f} s")
        self._network.stuck_until_s[replica.name, host.id] = asyncio.get_running_loop().time() + stuck_s

    async def _crash_daemon(self) -> None:
        host = self._chance.choice(self._hosts)
        if host.is_up and not host.is_gone:
            host.die()
            await asyncio.sleep(self._chance.uniform(1.0, 30.0))
            host.start()

    async def _reboot(self) -> None:
        host = self._chance.choice(self._hosts)
        if host.is_up and not host.is_gone:
            host.reboot()
            await asyncio.sleep(self._chance.uniform(10.0, 90.0))
            host.start()

    async def _refuse(self) -> None:
        host = self._chance.choice(self._hosts)
        refuse_s = self._chance.choice((10.0, 100.0)) * self._chance.uniform(0.5, 1.5)
        self._trace.note(host.id, f"takes no token for {refuse_s:.0f} s")
        host.refusing += 1
        await asyncio.sleep(refuse_s)
        host.refusing -= 1

    async def _shorten_list(self) -> None:
        self._chance.choice(self._hosts).shorten_next_list()

    async def _break_machine(self) -> None:
        self._chance.choice(self._hosts).break_machine()

    async def _stop_machine(self) -> None:
        self._chance.choice(self._hosts).stop_machine()

    async def _lose_host(self) -> None:
        left = [host for host in self._hosts if not host.is_gone]
        if len(left) > max(1, len(self._hosts) // 2):
            host = self._chance.choice(left)
            host.is_gone = True
            self._trace.note(host.id, "is gone for ever")

    # -- replicas and their database ------------------------------------------------------------------------------

    async def _kill(self) -> None:
        replica = self._chance.choice(self._replicas)
        replica.kill()
        await asyncio.sleep(self._chance.choice((0.1, 3.0, 20.0)))
        replica.start()

    async def _restart(self) -> None:
        replica = self._chance.choice(self._replicas)
        replica.stop()
        await asyncio.sleep(self._chance.uniform(0.0, 3.0))
        replica.start()

    async def _step_clock(self) -> None:
        replica = self._chance.choice(self._replicas)
        step_ms = round(self._chance.choice((100, 2_000, 30_000, 120_000)) * self._chance.uniform(-1.0, 1.0))
        replica.clock.offset_ms += step_ms
        self._trace.note(replica.name, f"its clock jumps by {step_ms} ms")

    async def _stall(self) -> None:
        stall_s = self._chance.choice((0.5, 5.0, 20.0)) * self._chance.uniform(0.5, 1.5)
        self._database.stalled_until_s = asyncio.get_running_loop().time() + stall_s
        self._trace.note("database", f"answers nobody for {stall_s:.1f} s")

    async def _lose_commit(self) -> None:
        fates = self._chance.choices((Fate.SILENT, Fate.UNDONE, Fate.DONE), k=self._chance.randrange(1, 6))
        self._database.fates += fates
        self._trace.note("database", f"the next commits will be {', '.join(fate.name.lower() for fate in fates)}")

    async def _take_away(self) -> None:
        away_s = self._chance.choice((0.1, 2.0, 15.0)) * self._chance.uniform(0.5, 1.5)
        self._database.away_until_s = asyncio.get_running_loop().time() + away_s
        self._trace.note("database", f"is away for {away_s:.1f} s")


async def _carry_out(fault: Fault) -> None:
    await fault()
