"""The host daemon's HTTP API: decoding, one call, encoding. Paths and bodies: `wire.host_routes`, `wire.host_api`.

`make_router` binds the handlers to the table by name; `boundary` wraps it for each listener.

Owns: handlers. Must not: decide anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Router, WebSocketRoute
from starlette.routing import Route as StarletteRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from fusevm import __version__
from fusevm.host.bodies import UNKNOWN, decode_noting, read_body, render_json
from fusevm.host.console import left_out, read_console
from fusevm.host.contract.create import is_contract_form
from fusevm.host.contract.handlers import CONTRACT_HANDLERS, create_by_contract, default_user, render_one
from fusevm.host.contract.relays import published_by_users
from fusevm.host.contract.render import render_body
from fusevm.host.daemon import Daemon
from fusevm.host.image_handlers import IMAGE_HANDLERS
from fusevm.host.port_rows import PortDraft
from fusevm.host.relay import relay_frames, relay_request, run_for_client
from fusevm.host.render import render_exec, render_network, render_port
from fusevm.host.snapshots import handlers as snapshots
from fusevm.model.errors import BadField, MethodNotAllowed, RouteNotFound
from fusevm.model.machine import Fence
from fusevm.model.network import Exposure, Network
from fusevm.wire.contract import CreateContractMachine
from fusevm.wire.decode import describe_unknown, render_warning
from fusevm.wire.guest import ExecRequest
from fusevm.wire.host_api import (
    CreateMachine,
    Health,
    HostExec,
    MachineEvent,
    PublishedPortAnswer,
    PublishedPortList,
    PublishPort,
    StorageAnswer,
    parse_fence,
)
from fusevm.wire.host_routes import HOST_ROUTES, render_host_openapi
from fusevm.wire.routes import Payload, Route

Handler: TypeAlias = Callable[[Daemon, Request, Route], Awaitable[Response]]

_DEFAULT_EXEC_MS, _MAX_EXEC_MS = 30_000, 300_000
_DEFAULT_TAIL_BYTES, _MAX_TAIL_BYTES = 64 << 10, 64 << 20
_KEEPALIVE_S = 15.0


def make_router(daemon: Daemon) -> Router:
    """Bind every route of the table to its handler."""
    by_path: dict[str, dict[str, Route]] = {}
    routes: list[BaseRoute] = []
    for route in HOST_ROUTES:
        if route.is_websocket:
            routes.append(WebSocketRoute(route.path, _FramesEndpoint(daemon)))
        else:
            # Two forms of one request are two rows: their handlers tell them apart.
            by_path.setdefault(route.path, {}).setdefault(route.method, route)
    # Starlette would answer 405 by itself, in words of its own: one endpoint per path takes all methods.
    routes += [StarletteRoute(path, _Endpoint(daemon, methods)) for path, methods in by_path.items()]
    return Router(routes, redirect_slashes=False, default=_no_route)


class _Endpoint:
    """All methods of one path."""

    def __init__(self, daemon: Daemon, routes: dict[str, Route]) -> None:
        self._daemon = daemon
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        route = self._routes.get(method)
        if route is None:
            raise MethodNotAllowed(method=method, path=scope["path"], allowed=", ".join(sorted(self._routes)))
        # For the access log and the metrics.
        scope["fuse.route"] = route.name
        if route.name.startswith("relay_"):
            await _relay(self._daemon, scope, receive, send)
            return
        response = await HANDLERS[route.name](self._daemon, Request(scope, receive), route)
        if scope.get(UNKNOWN):
            response.headers["warning"] = render_warning(describe_unknown(scope[UNKNOWN]))
        await response(scope, receive, send)


async def _no_route(scope: Scope, _receive: Receive, _send: Send) -> None:
    raise RouteNotFound(method=scope.get("method", "WEBSOCKET"), path=scope["path"])


# -- the host ---------------------------------------------------------------------------------------------------------


async def _health(_daemon: Daemon, _request: Request, _route: Route) -> Response:
    return render_json(Health())


async def _openapi(_daemon: Daemon, _request: Request, _route: Route) -> Response:
    return render_json(render_host_openapi(__version__))


async def _info(daemon: Daemon, _request: Request, _route: Route) -> Response:
    return render_json(await daemon.facts())


async def _state(daemon: Daemon, _request: Request, _route: Route) -> Response:
    return render_json(await daemon.render_state())


async def _storage(daemon: Daemon, _request: Request, _route: Route) -> Response:
    return render_json(StorageAnswer(report=await daemon.observe_storage()))


async def _metrics(daemon: Daemon, _request: Request, _route: Route) -> Response:
    return Response(await daemon.render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _events(daemon: Daemon, _request: Request, _route: Route) -> Response:
    return StreamingResponse(_event_lines(daemon), media_type=Payload.LINES.value)


async def _event_lines(daemon: Daemon) -> AsyncIterator[bytes]:
    with daemon.events.subscribe() as subscription:
        yield _line(daemon.events.hello)
        while True:
            try:
                async with asyncio.timeout(_KEEPALIVE_S):
                    event = await subscription.next()
            except TimeoutError:
                event = daemon.events.keepalive
            if event is None:
                return
            yield _line(event)


def _line(event: MachineEvent) -> bytes:
    return msgspec.json.encode(event) + b"\n"


# -- machines ---------------------------------------------------------------------------------------------------------


async def _list(daemon: Daemon, _request: Request, _route: Route) -> Response:
    uses = await daemon.uses()
    sick = daemon.machines.quarantined()
    machines = [render_body(it, sick.get(it.id), uses.get(it.id)) for it in daemon.machines.records()]
    return render_json({"machines": machines, "tombstones": await daemon.journal.tombstones()})


async def _create(daemon: Daemon, request: Request, route: Route) -> Response:
    raw, fence = await read_body(request, route), parse_fence(request.headers)
    if is_contract_form(raw):
        machine = await create_by_contract(daemon, decode_noting(request, raw, CreateContractMachine), fence)
    else:
        machine = await daemon.machines.create(decode_noting(request, raw, CreateMachine), fence)
    return render_one(machine, 201)


async def _get(daemon: Daemon, request: Request, _route: Route) -> Response:
    uses = await daemon.uses()
    machine = daemon.machines.record(request.path_params["id"])
    sick = daemon.machines.quarantined()
    return render_one(machine, quarantine=sick.get(machine.id), ports_used_s_ago=uses.get(machine.id))


async def _delete(daemon: Daemon, request: Request, _route: Route) -> Response:
    await daemon.machines.delete(request.path_params["id"], parse_fence(request.headers))
    return Response(status_code=204)


async def _start(daemon: Daemon, request: Request, _route: Route) -> Response:
    return render_one(await daemon.machines.start(request.path_params["id"], parse_fence(request.headers)))


async def _stop(daemon: Daemon, request: Request, _route: Route) -> Response:
    await daemon.machines.stop(request.path_params["id"], parse_fence(request.headers))
    return Response(status_code=204)


async def _exec(daemon: Daemon, request: Request, route: Route) -> Response:
    body = decode_noting(request, await read_body(request, route), HostExec)
    if not body.command:
        raise BadField(field="command", problem="must not be empty")
    limit_ms = min(body.timeout_ms if body.timeout_ms > 0 else _DEFAULT_EXEC_MS, _MAX_EXEC_MS)
    machine_id = request.path_params["id"]
    fence = parse_fence(request.headers)
    user = body.user or default_user(daemon.machines.owned(machine_id, fence))
    command = ExecRequest(cmd=body.command, cwd=body.cwd, env=body.env, user=user, timeout_ms=limit_ms)
    work = daemon.run_command(machine_id, fence, command)
    result = await run_for_client(request.receive, machine_id, work)
    if result is None:
        return Response(status_code=499)  # nobody reads it
    return render_json(render_exec(result))


async def _logs(daemon: Daemon, request: Request, _route: Route) -> Response:
    machine_id = request.path_params["id"]
    machine, path = daemon.console_log(machine_id, parse_fence(request.headers))
    query = request.query_params
    if query.get("source", "console") != "console":
        raise BadField(field="source", problem="the host has the source 'console' only")
    tail_bytes = _integer(query.get("tail_bytes"), "tail_bytes", _DEFAULT_TAIL_BYTES, _MAX_TAIL_BYTES)
    follow = _boolean(query.get("follow"), "follow")
    headers = {"x-fuse-lost": str(left_out(path, tail_bytes))}
    lines = read_console(path, tail_bytes=tail_bytes, follow=follow, is_live=lambda: daemon.is_live(machine))
    return StreamingResponse(lines, headers=headers, media_type="text/plain; charset=utf-8")


async def _relay(daemon: Daemon, scope: Scope, receive: Receive, send: Send) -> None:
    machine_id = scope["path_params"]["id"]
    fence = parse_fence(Request(scope).headers)
    agent = await daemon.guest(machine_id, fence)
    heard = receive if fence is None or fence.valid_until is None else _in_time(daemon, fence, receive)
    await relay_request(agent, machine_id, _guest_target(scope), scope, heard, send)


def _in_time(daemon: Daemon, fence: Fence, receive: Receive) -> Receive:
    """Receive the body of an order, all of which must arrive while it is valid: the guest hears no other end of it."""

    async def hear() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            daemon.machines.check_valid(fence)
        return message

    return hear


def _guest_target(scope: Scope) -> str:
    """What follows `/guest` in the request's own spelling, query included."""
    path = scope["raw_path"].decode("latin-1").partition("?")[0]
    target = "/" + "/".join(path.split("/")[4:])
    query = scope["query_string"].decode("latin-1")
    return f"{target}?{query}" if query else target


class _FramesEndpoint:
    """The WebSocket of interactive commands."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["fuse.route"] = "exec_frames"
        websocket = WebSocket(scope, receive, send)
        machine_id = scope["path_params"]["id"]
        agent = await self._daemon.guest(machine_id, parse_fence(websocket.headers))
        await relay_frames(agent, machine_id, websocket)


# -- network ----------------------------------------------------------------------------------------------------------


async def _publish(daemon: Daemon, request: Request, route: Route) -> Response:
    machine_id = daemon.machines.record(request.path_params["id"]).id
    body = decode_noting(request, await read_body(request, route), PublishPort)
    exposure = Exposure(port=body.port, protocol=body.protocol, name=body.name, host_port=body.host_port)
    draft = PortDraft(id=body.published_port_id, exposure=exposure)
    port = await daemon.machines.publish(machine_id, parse_fence(request.headers), draft)
    return render_json(PublishedPortAnswer(port=render_port(machine_id, port)), 201)


async def _list_ports(daemon: Daemon, request: Request, _route: Route) -> Response:
    machine = daemon.machines.record(request.path_params["id"])
    ports = published_by_users(machine)
    return render_json(PublishedPortList(ports=[render_port(machine.id, port) for port in ports]))


async def _unpublish(daemon: Daemon, request: Request, _route: Route) -> Response:
    path = request.path_params
    await daemon.machines.unpublish(path["id"], parse_fence(request.headers), path["port_id"])
    return Response(status_code=204)


async def _get_network(daemon: Daemon, request: Request, _route: Route) -> Response:
    machine = daemon.machines.record(request.path_params["id"])
    traffic = (await daemon.traffic()).get(machine.id)
    return render_json(render_network(machine, traffic))


async def _set_network(daemon: Daemon, request: Request, route: Route) -> Response:
    machine_id = daemon.machines.record(request.path_params["id"]).id
    body = decode_noting(request, await read_body(request, route), Network)
    machine = await daemon.machines.set_network(machine_id, parse_fence(request.headers), body)
    return render_json(render_network(machine, (await daemon.traffic()).get(machine.id)))


HANDLERS: dict[str, Handler] = {
    "health": _health,
    "info": _info,
    "openapi": _openapi,
    "list_machines": _list,
    "create_machine": _create,
    "create_contract_machine": _create,
    "get_machine": _get,
    "delete_machine": _delete,
    "start_machine": _start,
    "stop_machine": _stop,
    "exec": _exec,
    "publish_port": _publish,
    "list_published_ports": _list_ports,
    "unpublish_port": _unpublish,
    "get_network": _get_network,
    "set_network": _set_network,
    "logs": _logs,
    "events": _events,
    "state": _state,
    "storage_report": _storage,
    "metrics": _metrics,
    **CONTRACT_HANDLERS,
    **IMAGE_HANDLERS,
    **snapshots.HANDLERS,
}


# -- small ------------------------------------------------------------------------------------------------------------


def _integer(text: str | None, field: str, default: int, most: int) -> int:
    if text is None:
        return default
    if not text.isascii() or not text.isdecimal() or int(text) > most:
        raise BadField(field=field, problem=f"must be 0 to {most}")
    return int(text)


def _boolean(text: str | None, field: str) -> bool:
    match text:
        case None | "" | "false" | "0":
            return False
        case "true" | "1":
            return True
        case _:
            raise BadField(field=field, problem="must be true or false")
