"""From the id in a path to a record, and to a machine that can be used. What its caller may not see is not there."""

from fusevm.control.caller import Caller
from fusevm.control.plane import Plane
from fusevm.model.environment import Environment, State
from fusevm.model.errors import EnvironmentEnded, EnvironmentNotFound, WrongState
from fusevm.model.ids import task_id_of

#: States in which commands may be started, and in which files and logs may be read.
RUNS = frozenset({State.RUNNING})
READABLE = frozenset({State.RUNNING, State.DRAINING})


async def live_environment(
    plane: Plane,
    caller: Caller,
    id: str,  # noqa: A002 - as in the path
    uid: str = "",
) -> Environment:
    """The live environment of a public id. Raises EnvironmentEnded (with the uid), EnvironmentNotFound."""
    task_id = task_id_of(id)
    found = await plane.store.live(task_id) if task_id is not None else None
    if found is not None and uid in ("", found.uid) and caller.may_see(found.tenant):
        return found
    ended = await plane.store.get(uid) if uid else await plane.store.last_ended(task_id or "")
    if ended is None or ended.id != id or not ended.is_terminal or not caller.may_see(ended.tenant):
        raise EnvironmentNotFound(id=id)
    reason = ended.ending.reason if ended.ending is not None else ""
    raise EnvironmentEnded(id=id, uid=ended.uid, state=ended.state, cause=reason)


async def any_environment(plane: Plane, caller: Caller, id: str, uid: str = "") -> Environment:  # noqa: A002
    """With `uid` exactly that one, ended or not; else the live one. Raises EnvironmentEnded, EnvironmentNotFound."""
    if not uid:
        return await live_environment(plane, caller, id)
    found = await plane.store.get(uid)
    if found is None or found.id != id or not caller.may_see(found.tenant):
        raise EnvironmentNotFound(id=id)
    return found


async def usable_environment(
    plane: Plane,
    caller: Caller,
    id: str,  # noqa: A002
    states: frozenset[State] = RUNS,
) -> Environment:
    """A live environment in one of these states. Raises WrongState besides."""
    env = await live_environment(plane, caller, id)
    if env.state not in states:
        wanted = (
            "wait until it is running" if env.state is State.PROVISIONING else "only a running environment can do this"
        )
        raise WrongState(id=env.id, state=env.state, wanted=wanted)
    return env
