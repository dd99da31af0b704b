"""How far tests with hostile input go: in CI a fixed number of rounds from fixed seeds. `--fuzz-seconds N` lets each go
on for that long from other seeds, `--fuzz-requests N` walks that far through each server's API."""

import itertools
import random
import time
from collections.abc import Iterator

import pytest

#: Of each test; 0: the fixed rounds.
seconds = 0.0
#: Of each server; 0: the fixed number.
requests = 0


def add_options(parser: pytest.Parser) -> None:
    """The options of every run."""
    group = parser.getgroup("fuse")
    group.addoption("--fuzz-seconds", type=float, default=0.0, help="go on with each test of hostile bytes for so long")
    group.addoption("--fuzz-requests", type=int, default=0, help="walk through each server's API for so many requests")


def take_options(config: pytest.Config) -> None:
    """What was said."""
    global seconds, requests
    seconds, requests = config.getoption("--fuzz-seconds"), config.getoption("--fuzz-requests")


def rounds(name: str, count: int) -> Iterator[tuple[str, random.Random]]:
    """A source of chance for each round, and the seed that makes it again."""
    if not seconds:
        yield from ((seed, random.Random(seed)) for seed in (f"{name} {number}" for number in range(count)))
        return
    first, ends_at = time.time_ns(), time.monotonic() + seconds
    print(f"seed {first}")
    for number in itertools.count():
        if time.monotonic() > ends_at:
            return
        seed = f"{name} {first} {number}"
        yield seed, random.Random(seed)
