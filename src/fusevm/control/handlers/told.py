"""How an action went that a request has ordered and waited for, as the facts about the environment tell it."""

from collections.abc import Callable, Iterable

from fusevm.control.plane import Plane
from fusevm.model.environment import Environment
from fusevm.model.errors import EnvironmentEnded, Error, Internal
from fusevm.model.fact import Fact

#: Facts read at once.
PAGE = 100


async def find_fact(plane: Plane, after: Environment, is_wanted: Callable[[Fact], bool]) -> Fact | None:
    """The first such fact that is newer than the record `after`."""
    seq = after.event_seq
    while page := await plane.store.facts_of(after.uid, seq, PAGE):
        for stored in page:
            if is_wanted(stored.fact):
                return stored.fact
        seq = page[-1].fact.seq
    return None


def error_of(fact: Fact, known: Iterable[type[Error]], **fields: str) -> Error:
    """The error that a fact tells of, with its own sentence: one of the classes that the route knows, or Internal."""
    found = next((cls for cls in known if cls.reason == fact.reason), None)
    if found is None:
        return Internal(problem=fact.message)
    return found.rebuild(fact.message, {**fields, "problem": fact.message})


def ended(env: Environment) -> EnvironmentEnded:
    """The environment has begun to end, and with it what was under way."""
    state, reason = (env.ending.state, env.ending.reason) if env.ending is not None else (env.state, "")
    return EnvironmentEnded(id=env.id, uid=env.uid, state=state, cause=reason)
