"""Hosts: register, list, get, cordon, uncordon, drain, delete."""

from collections.abc import Callable

import msgspec
from msgspec.structs import replace
from starlette.responses import Response

from fusevm.control.call import Call, empty, reply
from fusevm.control.draining import drain_environments
from fusevm.control.etag import etag_of
from fusevm.control.handlers.pages import page_limit, parse_cursor, render_cursor
from fusevm.control.plane import Plane
from fusevm.control.registration import accept_host
from fusevm.control.render import render_host
from fusevm.model.errors import HostInUse, HostNotFound, PreconditionFailed, RevisionConflict
from fusevm.model.event import HostLost
from fusevm.model.host import Host, HostState, can_be_given_up
from fusevm.wire import rest, rest_fleet


async def register_host(plane: Plane, call: Call) -> Response:
    body, _ = await call.json(rest_fleet.RegisterHost)
    if not body.token:
        # Unset: the one that is known of this host, which its key is pinned by, so that nobody else can be given it.
        body = replace(body, token=await plane.directory.token_of(body.id))
    accepted = await accept_host(body, plane.directory, plane.config)
    host = await plane.directory.save(accepted.host, accepted.token)
    _mark(call, host)
    return reply(replace(render_host(host), warnings=list(accepted.warnings)), 201)


async def list_hosts(plane: Plane, call: Call) -> Response:
    after, limit = parse_cursor(call.text("cursor")), page_limit(call)
    found = await plane.store.host_page(after, limit + 1)
    page = rest.HostPage(
        hosts=[render_host(host) for host in found[:limit]],
        next_cursor=render_cursor(found[limit - 1].id) if len(found) > limit else "",
    )
    return reply(page)


async def get_host(plane: Plane, call: Call) -> Response:
    host = await _host(plane, call)
    _mark(call, host)
    return reply(render_host(host))


async def cordon_host(plane: Plane, call: Call) -> Response:
    await _change(plane, call, lambda host: replace(host, state=HostState.CORDONED))
    return empty()


async def uncordon_host(plane: Plane, call: Call) -> Response:
    await _change(plane, call, lambda host: replace(host, state=HostState.ACTIVE))
    return empty()


async def drain_host(plane: Plane, call: Call) -> Response:
    """Place nothing new, and drain what runs. What is busy or still being made is drained by whoever watches the host,
    as soon as it can be."""
    host = await _change(plane, call, lambda host: replace(host, state=HostState.DRAINING))
    await drain_environments(plane.store, plane.entry, host.id, f"request {call.request_id}")
    return empty()


async def delete_host(plane: Plane, call: Call) -> Response:
    host = await _host(plane, call)
    revision = call.expected(host.id, _key(host), host.revision)
    placed = (await plane.store.on_host(host.id)).records
    if placed and not (call.flag("force") and can_be_given_up(host)):
        raise HostInUse(id=host.id, machines=len(placed))
    for env in placed:
        await plane.entry.feed(env.uid, HostLost(cause=f"request {call.request_id}", host_id=host.id))
    try:
        await plane.store.drop_host(host.id, revision)
    except RevisionConflict as conflict:
        now = await _host(plane, call)
        raise PreconditionFailed(id=now.id, etag=etag_of(_key(now), now.revision)) from conflict
    await plane.directory.forget(host.id)
    return empty()


def _mark(call: Call, host: Host) -> None:
    """Bookings and the last answer change without a new revision, so that it alone is no ETag."""
    call.mark(_key(host), host.revision, msgspec.json.encode(render_host(host)))


def _key(host: Host) -> str:
    """By which its ETag is told from those of other records, and of an earlier host of the same id."""
    return f"{host.id}.{host.created_at_ms}"


async def _host(plane: Plane, call: Call) -> Host:
    host = await plane.store.host(call.params["id"])
    if host is None:
        raise HostNotFound(id=call.params["id"])
    return host


async def _change(plane: Plane, call: Call, change: Callable[[Host], Host]) -> Host:
    """Change a record that heartbeats change too."""
    while True:
        host = await _host(plane, call)
        call.expected(host.id, _key(host), host.revision)
        new = change(host)
        if new == host:
            return host
        try:
            return await plane.store.save_host(replace(new, updated_at_ms=plane.clock.now_ms()))
        except RevisionConflict:
            continue
