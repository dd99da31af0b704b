"""What a command line came to."""

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Fuse = Callable[..., Outcome]
