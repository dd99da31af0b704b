"""The questions that monitors and programs ask."""

import asyncio

from starlette.responses import Response

from fusevm.control.call import Call, reply
from fusevm.control.plane import Plane
from fusevm.core.invariants import violations
from fusevm.model.host import HostHealth
from fusevm.wire import rest
from fusevm.wire.openapi import render_openapi

READY_TIMEOUT_S = 2.0
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def health(_plane: Plane, _call: Call) -> Response:
    return reply(rest.Health())


async def ready(plane: Plane, _call: Call) -> Response:
    """Ready means that the store answers; hosts are told, but a fleet without hosts can still be asked."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await plane.store.ping()
            hosts = await plane.store.hosts()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer to this question
        return reply(rest.Ready(status="not_ready", checks={"state_store": str(error) or type(error).__name__}), 503)
    well = sum(host.health is HostHealth.OK for host in hosts)
    checks = {"state_store": "ok", "fleet": f"{well} of {len(hosts)} answer"}
    if plane.closing.is_set():
        return reply(rest.Ready(status="not_ready", checks={**checks, "server": "shutting down"}), 503)
    return reply(rest.Ready(status="ready", checks=checks))


async def metrics(plane: Plane, _call: Call) -> Response:
    return Response(plane.metrics.render(await plane.fleet.gauges()), media_type=METRICS_TYPE)


async def version(plane: Plane, _call: Call) -> Response:
    return reply(rest.Version(service=rest.SERVICE, version=plane.version))


async def check_invariants(plane: Plane, _call: Call) -> Response:
    """One reading of the store. What hosts list is left out: a list of another moment would raise false alarms."""
    world = await plane.store.world()
    found = await asyncio.to_thread(violations, world, None)
    return reply(rest.Invariants(violations=found, environments=len(world.environments), hosts=len(world.hosts)))


async def openapi(plane: Plane, _call: Call) -> Response:
    return reply(render_openapi(plane.version))
