"""Event streams."""

from collections.abc import AsyncGenerator

from starlette.responses import Response, StreamingResponse

from fusevm.control.call import Call
from fusevm.control.events import parse_last_id, start_position, stream_all, stream_environment
from fusevm.control.plane import Plane
from fusevm.control.resolve import any_environment
from fusevm.control.standing import while_standing
from fusevm.model.environment import Environment
from fusevm.model.errors import EnvironmentEnded

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_TYPE = "text/event-stream"


async def stream_environment_events(plane: Plane, call: Call) -> Response:
    last_id = _last_id(call)
    after: tuple[str, int] | None = parse_last_id(last_id) if last_id else None
    env = await _streamed(plane, call, after)
    seq = after[1] if after is not None and after[0] == env.uid else None
    return _streaming(plane, call, stream_environment(plane, env.uid, seq))


async def _streamed(plane: Plane, call: Call, after: tuple[str, int] | None) -> Environment:
    """The environment whose stream this is: the one named by uid, else by the event id, else the live or last one."""
    id_ = call.params["id"]
    if after is not None and not call.text("uid"):
        found = await plane.store.get(after[0])
        if found is not None and found.id == id_ and call.caller.may_see(found.tenant):
            return found
    try:
        return await any_environment(plane, call.caller, id_, call.text("uid"))
    except EnvironmentEnded as ended:
        return await any_environment(plane, call.caller, id_, ended.uid)


async def stream_events(plane: Plane, call: Call) -> Response:
    position = await start_position(plane, _last_id(call))
    return _streaming(plane, call, stream_all(plane, position, call.caller.sees))


def _streaming(plane: Plane, call: Call, messages: AsyncGenerator[bytes, None]) -> Response:
    return StreamingResponse(while_standing(plane, call.caller, messages), headers=_HEADERS, media_type=_TYPE)


def _last_id(call: Call) -> str:
    return call.header("last-event-id") or call.text("last_event_id")
