"""The way from the host to the Internet: the interfaces of the default route, and IPv4 forwarding.

Forwarding (`net.ipv4.ip_forward`) is switched on when machines need it and stays on: other programs may have come to
rely on it meanwhile, and only the administrator knows. A host that forwards routes between all its networks; where
that matters, its own firewall must say so.

Owns: the reading of routes, the one sysctl. Must not: touch nftables.
"""

import asyncio
from pathlib import Path

import msgspec

from fusevm.host.net.plan import Route
from fusevm.host.run import run
from fusevm.model.errors import BadSetting

UPLINK_SETTING = "egress_interface"
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
_TIMEOUT_S = 10.0


class _NextHop(msgspec.Struct):
    dev: str = ""


class _RouteLine(msgspec.Struct):
    """One line of `ip -j -4 route show`."""

    dst: str
    dev: str = ""
    metric: int = 0
    #: Of a multipath route, which has no `dev`.
    nexthops: list[_NextHop] = []

    @property
    def devices(self) -> list[str]:
        return [name for name in [self.dev, *(hop.dev for hop in self.nexthops)] if name]


class _LinkLine(msgspec.Struct):
    """One line of `ip -j link show`."""

    ifname: str


async def observe_routes() -> list[Route]:
    """List the host's IPv4 routes of every table, with its own addresses as local routes."""
    lines = await _show_routes("table", "all")
    return [Route(destination=_destination(line.dst), device=(line.devices or [""])[0]) for line in lines]


async def observe_uplinks(chosen: str = "") -> tuple[str, ...]:
    """Return the interfaces that lead to the Internet: the chosen one, else those of the best default route.

    Empty if there is no default route. BadSetting if the chosen interface does not exist.
    """
    if chosen:
        await _check_interface(chosen)
        return (chosen,)
    lines = [line for line in await _show_routes("default") if line.devices]
    best = min((line.metric for line in lines), default=0)
    return tuple(dict.fromkeys(device for line in lines if line.metric == best for device in line.devices))


async def ensure_forwarding() -> bool:
    """Switch IPv4 forwarding on; return whether it was off. Idempotent."""
    return await asyncio.to_thread(_write_forwarding)


async def _check_interface(name: str) -> None:
    done = await run(["ip", "-j", "link", "show"], timeout_s=_TIMEOUT_S)
    names = [line.ifname for line in msgspec.json.decode(done.stdout, type=list[_LinkLine])]
    if name not in names:
        problem = f"there is no interface {name!r}; this host has {', '.join(sorted(names))}"
        raise BadSetting(setting=UPLINK_SETTING, problem=problem)


async def _show_routes(*selector: str) -> list[_RouteLine]:
    done = await run(["ip", "-j", "-4", "route", "show", *selector], timeout_s=_TIMEOUT_S)
    return msgspec.json.decode(done.stdout or b"[]", type=list[_RouteLine])


def _destination(text: str) -> str:
    return "0.0.0.0/0" if text == "default" else text


def _write_forwarding() -> bool:
    if IP_FORWARD.read_text().strip() == "1":
        return False
    IP_FORWARD.write_text("1\n")
    return True
