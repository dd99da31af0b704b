"""What a check comes to."""

from enum import StrEnum

import msgspec


class Level(StrEnum):
    """What a finding means for machines."""

    OK = "ok"
    #: Machines run, but not as well as they could.
    DEGRADED = "degraded"
    #: No machine can run.
    UNFIT = "unfit"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check has seen."""

    level: Level
    #: What is there, for people.
    found: str
    #: What to do; empty when all is well.
    remedy: str = ""


def ok(found: str) -> Finding:
    """All is well, or nothing can be done about it."""
    return Finding(level=Level.OK, found=found)


def degraded(found: str, remedy: str) -> Finding:
    """Machines run, but not as well, or not as safely, as they could."""
    return Finding(level=Level.DEGRADED, found=found, remedy=remedy)


def unfit(found: str, remedy: str) -> Finding:
    """No machine can run."""
    return Finding(level=Level.UNFIT, found=found, remedy=remedy)
