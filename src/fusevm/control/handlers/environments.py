"""Create, list, get, delete, drain."""

import base64
import binascii
import json
from typing import Any

from starlette.responses import Response

from fusevm.control import idempotency
from fusevm.control.call import Call, empty, reply
from fusevm.control.plane import Plane
from fusevm.control.render import render_environment
from fusevm.control.resolve import any_environment, live_environment
from fusevm.control.signals import Subscription
from fusevm.control.store.protocol import Query, RequestKey
from fusevm.core.spec import complete
from fusevm.model.environment import (
    TERMINAL,
    Desired,
    DestroyRequested,
    DrainRequested,
    Environment,
    Spec,
    State,
)
from fusevm.model.errors import BadField, Error, Unimplemented
from fusevm.model.ids import environment_id, parse_task_id
from fusevm.wire import rest

#: Fields of a create that are part of the API and not honoured yet. Empty values mean unset and pass.
_LATER = (
    "manifest_inline",
    "secrets",
    "startup_script",
    "startup_script_timeout_seconds",
    "gateway_url",
    "gateway_token",
    "expose",
    "healthcheck",
    "desktop",
    "files",
    "seed_snapshot_id",
    "agent",
    "queue_seconds",
)
_LATER_IN_SPEC = ("gpus", "gpu_kind", "gpu_profile", "huge_pages")


async def create_environment(plane: Plane, call: Call) -> Response:
    body, raw = await call.json(rest.CreateRequest)
    task_id, spec = parse_task_id(body.task_id), _spec(plane, body)
    key = idempotency.request_key(call, raw)
    if key is None:
        return await _create(plane, call, task_id, spec, None)
    before = await idempotency.claim(plane, key)
    if before is None or idempotency.is_dead(plane, before):
        response = await _create(plane, call, task_id, spec, key)
    elif before.uid and not before.status:
        response = await _join(plane, call, environment_id(task_id), before.uid)
    else:
        return idempotency.replayed(key, before)
    await idempotency.keep(plane, key, response)
    return response


async def _create(plane: Plane, call: Call, task_id: str, spec: Spec, key: RequestKey | None) -> Response:
    identity = plane.entry.new_identity(task_id)
    with plane.signals.subscribe(identity.uid) as news:
        try:
            record = await plane.entry.begin(identity, spec, cause=_cause(call), key=key)
        except Error:
            if key is not None:
                await plane.store.forget_request(key)
            raise
        return await _created(plane, call, record, news)


async def _join(plane: Plane, call: Call, id_: str, uid: str) -> Response:
    """Wait with the first request for what it made."""
    with plane.signals.subscribe(uid) as news:
        return await _created(plane, call, await any_environment(plane, id_, uid), news)


async def _created(plane: Plane, call: Call, record: Environment, news: Subscription) -> Response:
    """Wait until it runs, or not; then tell what it is."""
    if call.prefers_async():
        return reply(render_environment(record), 202)
    record = await plane.entry.wait_for(
        record, lambda env: env.state is not State.PROVISIONING, plane.config.wait_s, news=news, closing=plane.closing
    )
    return reply(render_environment(record), 201)


def _spec(plane: Plane, body: rest.CreateRequest) -> Spec:
    """Complete what was asked for. Raises BadField, Unimplemented naming the field."""
    for name in _LATER:
        if getattr(body, name):
            raise Unimplemented(feature=f"the field {name}", why="it is not built yet; leave it out")
    asked = body.spec or rest.SpecInput()
    for name in _LATER_IN_SPEC:
        if getattr(asked, name):
            raise Unimplemented(feature=f"the field spec.{name}", why="it is not built yet; leave it out")
    network = body.network or rest.NetworkInput()
    if network.rules:
        raise Unimplemented(feature="the field network.rules", why="only network.internet is honoured yet")
    if body.egress is not None and body.egress.mode not in ("", "direct"):
        raise Unimplemented(feature=f"egress mode {body.egress.mode!r}", why="only direct egress is available")
    return complete(
        plane.config.policy,
        cpus=asked.cpus,
        ram_mb=asked.ram_mb,
        storage_gb=asked.storage_gb,
        region=asked.region,
        image=asked.image,
        arch=asked.arch,
        host_id=asked.host_id,
        labels=asked.labels,
        max_runtime_seconds=asked.max_runtime_seconds,
        idle_timeout_seconds=asked.idle_timeout_seconds,
        internet=network.internet,
    )


async def list_environments(plane: Plane, call: Call) -> Response:
    state = call.text("state")
    if state and state not in {known.value for known in State}:
        raise BadField(field="state", problem=f"{state[:40]!r} is none of {', '.join(State)}")
    limit = page_limit(call)
    query = Query(
        task_id=call.text("task_id"),
        state=state,
        host_id=call.text("host_id"),
        ended=call.flag("ended") or state in TERMINAL,
        after=parse_cursor(call.text("cursor")),
        limit=limit + 1,
    )
    found = await plane.store.list_page(query)
    page = rest.EnvironmentPage(
        environments=[render_environment(env) for env in found[:limit]],
        next_cursor=render_cursor(found[limit - 1].uid) if len(found) > limit else "",
    )
    return reply(page)


async def get_environment(plane: Plane, call: Call) -> Response:
    return reply(render_environment(await any_environment(plane, call.params["id"], call.text("uid"))))


async def delete_environment(plane: Plane, call: Call) -> Response:
    env = await live_environment(plane, call.params["id"], call.text("uid"))
    if env.desired is Desired.DESTROYED:
        return reply(render_environment(env), 202)
    with plane.signals.subscribe(env.uid) as news:
        env = await plane.entry.feed(env.uid, DestroyRequested(cause=_cause(call)), known=env)
        if not call.prefers_async():
            env = await plane.entry.wait_for(
                env, lambda seen: seen.is_terminal, plane.config.wait_s, news=news, closing=plane.closing
            )
    return empty() if env.is_terminal else reply(render_environment(env), 202)


async def drain_environment(plane: Plane, call: Call) -> Response:
    env = await live_environment(plane, call.params["id"])
    env = await plane.entry.feed(env.uid, DrainRequested(cause=_cause(call)), known=env)
    return reply(render_environment(env))


def page_limit(call: Call) -> int:
    """The page size; what cannot be read means the default, as in the contract."""
    asked = call.text("limit")
    number = int(asked) if asked.isdecimal() else 0
    return min(number, rest.PAGE_MAX) if number > 0 else rest.PAGE_DEFAULT


def render_cursor(after: str) -> str:
    """An opaque cursor."""
    return base64.urlsafe_b64encode(json.dumps({"after": after}).encode()).decode().rstrip("=")


def parse_cursor(text: str) -> str:
    """What a cursor stands for; empty for none. Raises BadField."""
    if not text:
        return ""
    try:
        value: Any = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
        after = value["after"]
    except (binascii.Error, ValueError, KeyError, TypeError) as error:
        raise BadField(field="cursor", problem="this is no cursor of ours; take next_cursor as it is") from error
    if not isinstance(after, str):
        raise BadField(field="cursor", problem="this is no cursor of ours; take next_cursor as it is")
    return after


def _cause(call: Call) -> str:
    return f"request {call.request_id}"
