"""Snapshots: take, list, get, find a layer, restore in place, delete."""

import asyncio

from starlette.responses import Response

from fusevm.control.call import Call, empty, reply
from fusevm.control.handlers.pages import page_limit, parse_cursor, render_cursor
from fusevm.control.handlers.told import ended, find_fact
from fusevm.control.plane import Plane
from fusevm.control.render import render_snapshot
from fusevm.control.resolve import live_environment
from fusevm.control.store.protocol import SnapshotQuery
from fusevm.core import snapshots as rules
from fusevm.core.endings import CUT_OFF
from fusevm.model import ids
from fusevm.model.environment import Environment, RestoreMachine, SnapshotMachine
from fusevm.model.errors import BadField, NotSupported, RevisionConflict, SnapshotFailed, SnapshotNotFound
from fusevm.model.event import Event, RestoreRequested, SnapshotRequested
from fusevm.model.host import HostHealth
from fusevm.model.snapshot import Snapshot, SnapshotKind, SnapshotState
from fusevm.wire import rest_fleet

#: Layers of one key that are looked at for one whose host is there.
LAYERS = 50


async def create_snapshot(plane: Plane, call: Call) -> Response:
    body, _ = await call.json(rest_fleet.SnapshotRequest)
    env = await live_environment(plane, call.caller, call.params["id"])
    snapshot = await _described(plane, env, body)
    event = SnapshotRequested(cause=f"request {call.request_id}", snapshot=snapshot)
    await _order(plane, call, env, event, snapshot)
    made = await plane.store.snapshot(snapshot.id)
    if made is None:
        raise SnapshotNotFound(id=snapshot.id)
    if made.state is SnapshotState.ERROR:
        raise SnapshotFailed(id=made.id, problem=made.last_error)
    return reply(render_snapshot(made), 201 if made.state is SnapshotState.READY else 202)


async def _described(plane: Plane, env: Environment, body: rest_fleet.SnapshotRequest) -> Snapshot:
    query = SnapshotQuery(uid=env.uid, state=SnapshotState.READY, limit=1)
    parents = await plane.store.snapshots(query)
    host = await plane.store.host(env.host_id)
    now_ms = plane.clock.now_ms()
    return rules.begin_snapshot(
        env,
        plane.entry.new_id(),
        now_ms=now_ms,
        parent_id=parents[0].id if parents else "",
        kind=SnapshotKind.LIVE if body.live else SnapshotKind.DISK,
        mode=body.mode or "",
        comment=body.comment or "",
        metadata=body.metadata,
        layer_key=body.layer_key or "",
        arch=host.arch if host is not None else "",
        export_ref=body.export_ref or "",
        export_status=body.export_status or "",
        retention_seconds=body.retention_seconds or 0,
    )


async def _order(plane: Plane, call: Call, env: Environment, event: Event, snapshot: Snapshot) -> bool:
    """Give the action and wait for its end; False: it goes on. Raises RevisionConflict when the snapshot to restore is
    not as it was read, EnvironmentEnded when the environment ends first, and what the action was refused for."""
    with plane.signals.subscribe(env.uid) as news:
        before = await plane.entry.feed(env.uid, event, known=env)
        call.acted_on = env.uid
        if call.prefers_async():
            return False
        after = await plane.entry.wait_for(
            before,
            lambda seen: not _is_at(seen, snapshot.id),
            plane.config.wait_s,
            news=news,
            closing=plane.closing,
        )
    if _is_at(after, snapshot.id):
        return False
    told = await find_fact(plane, before, lambda fact: fact.data.get("snapshot_id") == snapshot.id)
    if told is None or told.reason == CUT_OFF:
        raise ended(after)
    if told.reason == NotSupported.reason:
        raise NotSupported(feature=f"a snapshot of a machine on host {env.host_id}")
    if told.message:
        raise SnapshotFailed(id=snapshot.id, problem=told.message)
    return True


def _is_at(env: Environment, snapshot_id: str) -> bool:
    return isinstance(env.pending, SnapshotMachine | RestoreMachine) and env.pending.snapshot.id == snapshot_id


async def list_snapshots(plane: Plane, call: Call) -> Response:
    state, limit = call.text("state"), page_limit(call)
    if state and state not in set(SnapshotState):
        raise BadField(field="state", problem=f"{state[:40]!r} is none of {', '.join(SnapshotState)}")
    asked_tenant, sees = call.text("tenant_id"), call.caller.sees
    vm_id = call.text("vm_id")
    task_id = call.text("task_id")
    if vm_id:
        named = ids.task_id_of(vm_id)
        if named is None or task_id not in ("", named):
            return reply(rest_fleet.SnapshotPage(snapshots=[]))
        task_id = named
    if sees is not None and asked_tenant not in ("", sees):
        return reply(rest_fleet.SnapshotPage(snapshots=[]))
    query = SnapshotQuery(
        uid=call.text("uid"),
        task_id=task_id,
        tenant=sees if sees is not None else asked_tenant or None,
        state=state,
        mode=call.text("mode"),
        name=call.text("name"),
        layer_key=call.text("layer_key"),
        arch=call.text("arch"),
        after=parse_cursor(call.text("cursor")),
        limit=limit + 1,
    )
    found = await plane.store.snapshots(query)
    page = rest_fleet.SnapshotPage(
        snapshots=[render_snapshot(one) for one in found[:limit]],
        next_cursor=render_cursor(found[limit - 1].id) if len(found) > limit else "",
    )
    return reply(page)


async def resolve_snapshot(plane: Plane, call: Call) -> Response:
    for name in ("layer_key", "arch"):
        if not call.text(name):
            raise BadField(field=name, problem="give both layer_key and arch")
    query = SnapshotQuery(
        tenant=call.caller.tenant,
        state=SnapshotState.READY,
        layer_key=call.text("layer_key"),
        arch=call.text("arch"),
        limit=LAYERS,
    )
    within_reach = {host.id for host in await plane.store.hosts() if host.health is not HostHealth.LOST}
    for layer in await plane.store.snapshots(query):
        if layer.host_id in within_reach:
            return reply(rest_fleet.ResolvedLayer(found=True, snapshot=render_snapshot(layer)))
    return reply(rest_fleet.ResolvedLayer(found=False))


async def get_snapshot(plane: Plane, call: Call) -> Response:
    snapshot = await _snapshot(plane, call)
    call.mark(snapshot.id, snapshot.revision)
    return reply(render_snapshot(snapshot))


async def restore_snapshot(plane: Plane, call: Call) -> Response:
    while True:
        snapshot = await _snapshot(plane, call)
        call.expected(snapshot.id, snapshot.id, snapshot.revision)
        env = await live_environment(plane, call.caller, ids.environment_id(snapshot.task_id))
        rules.check_restorable(snapshot, env)
        event = RestoreRequested(cause=f"request {call.request_id}", snapshot=snapshot)
        try:
            is_over = await _order(plane, call, env, event, snapshot)
        except RevisionConflict:
            continue  # the snapshot was deleted, used or stranded since it was read
        return empty() if is_over else empty(202)


async def delete_snapshot(plane: Plane, call: Call) -> Response:
    snapshot_id = await _doom(plane, call)
    try:
        async with asyncio.timeout(plane.config.wait_s):
            await plane.collector.collect(snapshot_id)
    except TimeoutError:
        return empty(202)  # the lease runs out, and it is tried again
    left = await plane.store.snapshot(snapshot_id)
    return empty() if left is None else empty(202)


async def _doom(plane: Plane, call: Call) -> str:
    """Mark the snapshot for deletion, if nobody is at it. Raises ActionUnderWay, PreconditionFailed."""
    while True:
        snapshot = await _snapshot(plane, call)
        call.expected(snapshot.id, snapshot.id, snapshot.revision)
        doomed = rules.begin_delete(snapshot, plane.clock.now_ms())
        try:
            if doomed is not snapshot:
                await plane.store.save_snapshot(doomed)
        except RevisionConflict:
            continue
        return snapshot.id


async def _snapshot(plane: Plane, call: Call) -> Snapshot:
    found = await plane.store.snapshot(call.params["id"])
    if found is None or not call.caller.may_see(found.tenant):
        raise SnapshotNotFound(id=call.params["id"])
    return found
