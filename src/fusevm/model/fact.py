"""A fact: one thing that happened to one environment, numbered and never changed. Users read facts as *events*."""

from enum import StrEnum

import msgspec

from fusevm.model.environment import State


class Kind(StrEnum):
    """What a fact is about."""

    STATE = "state"
    STARTUP_OUTPUT = "startup_output"
    EXEC = "exec"
    AGENT = "agent"
    HEALTH = "health"
    SNAPSHOT = "snapshot"
    HOST = "host"
    DEAD_LETTER = "dead_letter"


class Fact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One numbered fact of one environment."""

    uid: str
    #: 1, 2, 3 ... without a gap per environment.
    seq: int
    kind: Kind
    #: State of the environment after the fact.
    state: State
    #: Milliseconds since the epoch.
    at_ms: int
    #: Id of the request, action or observation behind it.
    cause: str
    #: A sentence for people; empty where the kind says it all.
    message: str = ""
    #: Stable snake_case where there is one.
    reason: str = ""
    #: More, by kind; strings only.
    data: dict[str, str] = {}
