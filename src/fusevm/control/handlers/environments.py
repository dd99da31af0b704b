"""Create, list, get, delete, drain, rotate the token."""

from collections.abc import Callable

from starlette.responses import Response

from fusevm.control.call import Call, empty, reply
from fusevm.control.create_order import new_token, read_network, read_order
from fusevm.control.handlers.pages import page_limit, parse_cursor, render_cursor
from fusevm.control.handlers.told import ended, error_of, find_fact
from fusevm.control.plane import Plane
from fusevm.control.render import render_environment
from fusevm.control.resolve import any_environment, live_environment, usable_environment
from fusevm.control.signals import Subscription
from fusevm.control.store.protocol import Query, SealedRow
from fusevm.core.setup import with_token
from fusevm.model.environment import TERMINAL, ChangeNetwork, Desired, DrainAgent, Environment, RotateToken, State
from fusevm.model.errors import BadField, Timeout
from fusevm.model.event import DestroyRequested, DrainRequested, Event, NetworkRequested, RotateRequested
from fusevm.model.ids import environment_id, parse_task_id
from fusevm.model.network import check_network
from fusevm.wire import rest
from fusevm.wire.errors import ending_error
from fusevm.wire.routes import errors_of


async def create_environment(plane: Plane, call: Call) -> Response:
    body, _ = await call.json(rest.CreateRequest)
    task_id = parse_task_id(body.task_id)
    if call.acted_on:
        return await _join(plane, call, environment_id(task_id), call.acted_on)
    identity = plane.entry.new_identity(task_id, call.caller.tenant)
    asked = await read_order(plane, call.caller.tenant, identity.uid, body)
    with plane.signals.subscribe(identity.uid) as news:
        record = await plane.entry.begin(identity, asked, cause=_cause(call), key=call.request_key)
        call.acted_on = record.uid
        return await _created(plane, call, record, news)


async def _join(plane: Plane, call: Call, id_: str, uid: str) -> Response:
    """Wait with the first request for what it made."""
    with plane.signals.subscribe(uid) as news:
        return await _created(plane, call, await any_environment(plane, call.caller, id_, uid), news)


async def _created(plane: Plane, call: Call, record: Environment, news: Subscription) -> Response:
    """Wait until it runs; then tell what it is. Raises the error of its ending where it ends instead."""
    if call.prefers_async():
        return _shown(call, record, 202)
    record = await plane.entry.wait_for(
        record, lambda env: env.state is not State.PROVISIONING, plane.config.wait_s, news=news, closing=plane.closing
    )
    if record.ending is not None:
        state, reason, message = record.ending.state, record.ending.reason, record.ending.message
        raise ending_error(record.id, record.uid, state=state, reason=reason, message=message)
    return _shown(call, record, 201)


async def list_environments(plane: Plane, call: Call) -> Response:
    state = call.text("state")
    if state and state not in {known.value for known in State}:
        raise BadField(field="state", problem=f"{state[:40]!r} is none of {', '.join(State)}")
    limit = page_limit(call)
    query = Query(
        task_id=call.text("task_id"),
        state=state,
        host_id=call.text("host_id"),
        tenant=call.caller.sees,
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
    return _shown(call, await any_environment(plane, call.caller, call.params["id"], call.text("uid")))


async def delete_environment(plane: Plane, call: Call) -> Response:
    env = await live_environment(plane, call.caller, call.params["id"], call.text("uid"))
    only = call.expected(env.id, env.uid, env.revision)
    if env.desired is Desired.DESTROYED:
        return _shown(call, env, 202)
    if only is None:
        # What has ended is told before the end; with If-Match, that would be another revision.
        await plane.commands.tell(env.uid)
    with plane.signals.subscribe(env.uid) as news:
        env = await plane.entry.feed(env.uid, DestroyRequested(cause=_cause(call)), known=env, only=only)
        if not call.prefers_async():
            env = await plane.entry.wait_for(
                env, lambda seen: seen.is_terminal, plane.config.wait_s, news=news, closing=plane.closing
            )
    return empty() if env.is_terminal else _shown(call, env, 202)


async def drain_environment(plane: Plane, call: Call) -> Response:
    """Waits for the drain command and the daemon's end, at most 55 s; how it went is in `error` and in the events."""
    env = await live_environment(plane, call.caller, call.params["id"])
    event = DrainRequested(cause=_cause(call))
    _, env = await _until(plane, call, env, event, lambda seen: not isinstance(seen.pending, DrainAgent))
    return _shown(call, env)


async def rotate_token(plane: Plane, call: Call) -> Response:
    """An environment that brought nothing has no token, and there is nothing to do."""
    env = await usable_environment(plane, call.caller, call.params["id"])
    call.expected(env.id, env.uid, env.revision)
    if not env.duties.setup:
        return empty()
    setup = with_token(await plane.vault.load(env.uid), new_token())
    sealed = plane.vault.seal(env.uid, setup)
    event = RotateRequested(cause=_cause(call))
    before, after = await _until(
        plane, call, env, event, lambda seen: not isinstance(seen.pending, RotateToken), sealed
    )
    if isinstance(after.pending, RotateToken):
        return empty(202)
    told = await find_fact(plane, before, lambda fact: fact.data.get("asked_by") == event.cause)
    if told is None:
        raise ended(after)
    if told.reason == "rotate_timeout":
        limit_s = plane.config.policy.rotate_deadline_ms // 1000
        raise Timeout(what=f"giving {env.id} its new token ({told.message})", limit_s=limit_s)
    if told.reason != "token_rotated":
        raise error_of(told, errors_of(call.route), id=env.id)
    return empty()


async def change_network(plane: Plane, call: Call) -> Response:
    """Hold a running machine to another policy; waits until its host does."""
    env = await usable_environment(plane, call.caller, call.params["id"])
    body, _ = await call.json(rest.NetworkInput)
    network = check_network(read_network(body))
    event = NetworkRequested(cause=_cause(call), network=network)

    def is_done(seen: Environment) -> bool:
        # Another one follows where this one was given up.
        return not (isinstance(seen.pending, ChangeNetwork) and seen.pending.cause == event.cause)

    before, after = await _until(plane, call, env, event, is_done)
    if not is_done(after):
        return _shown(call, after, 202)
    told = await find_fact(plane, before, lambda fact: fact.data.get("asked_by") == event.cause)
    if told is None:
        raise ended(after)
    if told.reason == "network_timeout":
        limit_s = plane.config.policy.network_deadline_ms // 1000
        raise Timeout(what=f"changing the network of {env.id} ({told.message})", limit_s=limit_s)
    if told.reason != "network_changed":
        raise error_of(told, errors_of(call.route), id=env.id)
    return _shown(call, after)


async def _until(
    plane: Plane,
    call: Call,
    env: Environment,
    event: Event,
    is_done: Callable[[Environment], bool],
    sealed: SealedRow | None = None,
) -> tuple[Environment, Environment]:
    """Feed an event and wait for what it sets off: the records right after, and when it was over."""
    only = call.expected(env.id, env.uid, env.revision)
    with plane.signals.subscribe(env.uid) as news:
        before = await plane.entry.feed(env.uid, event, known=env, only=only, sealed=sealed)
        call.acted_on = env.uid
        if call.prefers_async():
            return before, before
        after = await plane.entry.wait_for(before, is_done, plane.config.wait_s, news=news, closing=plane.closing)
        return before, after


def _shown(call: Call, env: Environment, status: int = 200) -> Response:
    """The environment with its ETag."""
    call.mark(env.uid, env.revision)
    return reply(render_environment(env), status)


def _cause(call: Call) -> str:
    return f"request {call.request_id}"
