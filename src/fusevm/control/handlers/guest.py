"""Processes, files and archives: passed on to the host and from there to the guest agent, streaming both ways."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from urllib.parse import quote, urlencode

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fusevm.control.activity import in_use
from fusevm.control.call import Call
from fusevm.control.caller import Caller
from fusevm.control.host_api import Body, GuestRequest, Upstream
from fusevm.control.middleware import Handler
from fusevm.control.outcome import fence_of
from fusevm.control.plane import Plane
from fusevm.control.race import first_of
from fusevm.control.resolve import READABLE, RUNS, usable_environment
from fusevm.control.standing import keep_checking
from fusevm.model.environment import Environment, State
from fusevm.wire.routes import NO_LIMIT, Payload, Route

#: Seconds until the head of an answer; an upload's answer comes after its last byte.
ANSWER_TIMEOUT_S, UPLOAD_TIMEOUT_S = 60.0, 86_400.0
#: Answers up to this length are read before they are passed on.
SHORT_BYTES = 64 << 10
_ASKED = ("content-type", "content-length", "range", "if-range")
_ANSWERED = ("content-type", "content-length", "content-range", "accept-ranges", "last-modified", "etag")
#: Ours, not the guest's.
_OWN_PARAMETERS = frozenset({"action", "uid"})


class RelayedResponse(StreamingResponse):
    """An answer from the host, passed on as it arrives. The environment is in use until it has ended. It is cut off
    when its caller's key is good no longer."""

    def __init__(
        self, plane: Plane, caller: Caller, upstream: Upstream, use: Callable[[], AbstractAsyncContextManager[None]]
    ) -> None:
        headers = {name: value for name, value in upstream.headers.items() if _is_passed_on(name)}
        super().__init__(upstream.chunks(), upstream.status, headers=headers)
        self._plane = plane
        self._caller = caller
        self._upstream = upstream
        self._use = use

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._use():
                await first_of(super().__call__(scope, receive, send), keep_checking(self._plane, self._caller))
        finally:
            await self._upstream.close()


def relay_to(path: str, states: frozenset[State]) -> Handler:
    """A handler that passes its request on to `path` of the guest agent; braces are filled from the public path. What
    streams into the guest is cut off when its caller's key is good no longer."""

    async def handler(plane: Plane, call: Call) -> Response:
        env = await usable_environment(plane, call.caller, call.params["id"], states)
        body = await _body(call)
        segments = {name: quote(value, safe="") for name, value in call.params.items()}
        target = "guest/" + path.format(**segments) + _query(call)

        def use() -> AbstractAsyncContextManager[None]:
            return in_use(plane, env, f"request {call.request_id}")

        async with use():
            sending = _send(plane, env, call, target, body)
            if call.route.limit == NO_LIMIT:
                upstream = await first_of(sending, keep_checking(plane, call.caller))
            else:
                upstream = await sending
            if call.route.gives is Payload.NONE:
                return await _without_body(upstream, is_head=call.route.method == "HEAD")
            if _is_short(upstream):
                return _noted(plane, env, call, await _whole(upstream))
        return RelayedResponse(plane, call.caller, upstream, use)

    return handler


async def _body(call: Call) -> Body:
    """Checked and whole for JSON, a stream for bytes."""
    if call.route.takes is Payload.NONE:
        return None
    if call.route.limit == NO_LIMIT:
        return call.stream()
    _, raw = await call.json(call.route.request)
    return raw


async def _send(plane: Plane, env: Environment, call: Call, target: str, body: Body) -> Upstream:
    host = await plane.directory.client(env.host_id)
    headers = {name: value for name in _ASKED if (value := call.header(name))}
    if isinstance(body, bytes):
        headers.pop("content-length", None)
    elif body is None:
        headers.pop("content-length", None)
        headers.pop("content-type", None)
    request = GuestRequest(
        fence=fence_of(plane.store.cluster, env),
        machine_id=env.machine_id,
        # An error in answer to HEAD has no body, so nobody could tell what it was: ask for GET, and hang up.
        method="GET" if call.route.method == "HEAD" else call.route.method,
        target=target,
        headers=headers,
        body=body,
        timeout_s=UPLOAD_TIMEOUT_S if call.route.limit == NO_LIMIT else ANSWER_TIMEOUT_S,
    )
    return await host.relay(request)


def _is_short(upstream: Upstream) -> bool:
    """Is its length known, and small?"""
    length = upstream.headers.get("content-length", "")
    return length.isdecimal() and int(length) <= SHORT_BYTES


async def _whole(upstream: Upstream) -> Response:
    """A short answer at once: a stream of one chunk would cost more than all the rest of its way."""
    try:
        content = b"".join([chunk async for chunk in upstream.chunks()])
    finally:
        await upstream.close()
    headers = {name: value for name, value in upstream.headers.items() if _is_passed_on(name)}
    return Response(content, upstream.status, headers=headers)


async def _without_body(upstream: Upstream, *, is_head: bool) -> Response:
    """An answer without a body; to HEAD, with the headers that GET would have."""
    try:
        if not is_head:
            async for _ in upstream.chunks():
                pass
    finally:
        await upstream.close()
    response = Response(None, upstream.status)
    if is_head:
        for name, value in upstream.headers.items():
            if _is_passed_on(name):
                response.headers[name] = value
    return response


def _noted(plane: Plane, env: Environment, call: Call, response: Response) -> Response:
    """An answer that tells of a new background process is told as an event, too."""
    if call.route.name == "start_process" and response.status_code == 201:
        pid = msgspec.json.decode(response.body, type=_Started).pid
        plane.commands.started(env, f"request {call.request_id}", pid)
    return response


class _Started(msgspec.Struct):
    pid: int = 0


def _query(call: Call) -> str:
    items = [item for item in call.connection.query_params.multi_items() if item[0] not in _OWN_PARAMETERS]
    return "?" + urlencode(items, quote_via=quote) if items else ""


def _is_passed_on(name: str) -> bool:
    return name in _ANSWERED or name.startswith("x-fuse-")


def states_for(route: Route) -> frozenset[State]:
    """Reading is possible while an environment drains, starting and changing is not."""
    return READABLE if route.method in ("GET", "HEAD") or route.name in _READING_POSTS else RUNS


_READING_POSTS = frozenset({"stat_path", "list_path"})
_PATHS = {
    "start_process": "processes",
    "list_processes": "processes",
    "get_process": "processes/{pid}",
    "read_process_output": "processes/{pid}/output",
    "signal_process": "processes/{pid}/signal",
    "write_process_stdin": "processes/{pid}/stdin",
    **dict.fromkeys(("read_file", "head_file", "write_file", "delete_file"), "files"),
    **dict.fromkeys(("stat_path", "list_path", "mkdir_path", "move_path", "remove_path"), "files"),
    **dict.fromkeys(("read_archive", "write_archive"), "archive"),
}


def handlers(routes: tuple[Route, ...]) -> dict[str, Handler]:
    """Name of each relayed route to its handler."""
    return {route.name: relay_to(_PATHS[route.name], states_for(route)) for route in routes if route.name in _PATHS}
