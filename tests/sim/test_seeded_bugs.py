"""A checker must be seen to fail: with each safeguard off, one at a time, a committed seed breaks a rule that it keeps
with the safeguard on.

The faults that a safeguard is for are frequent here, and each has two seeds, so that a change elsewhere, which gives a
seed another course, does not hide the mistake.
"""

from typing import NamedTuple

import pytest

from fusevm.testing.simulation import SMALL, Luck, Safeguards, Scale, simulate


class Off(NamedTuple):
    """A safeguard that is off, and how that is noticed."""

    safeguard: str
    seeds: tuple[int, ...]
    #: What the checker says.
    sentence: str
    luck: Luck
    scale: Scale = SMALL


OFF = [
    Off(
        "fences",
        (1, 2),
        "was put back by the superseded action",
        Luck(late=0.2, duplicate=0.5),
        Scale(hosts=8, environments=150, room=12),
    ),
    Off("tombstones", (1, 2), "after its end was confirmed", Luck(late=0.1, duplicate=0.2)),
    Off("leases", (1, 2), "is leased to two workers at once", Luck()),
    Off(
        "deadlines",
        (1, 2, 3),
        "which was over",
        Luck(stuck_ways=4.0, refused_boot=0.0),
        Scale(hosts=8, environments=120, room=12),
    ),
    Off("refusals", (1, 2), "which r", Luck(refusals=1.0)),
    Off("strikes", (1, 2), "given up (machine_missing), but", Luck(short_lists=3.0)),
]


@pytest.mark.parametrize("off", OFF, ids=lambda off: off.safeguard)
def test_a_missing_safeguard_is_noticed(off: Off):
    broken = Safeguards(**{off.safeguard: False})
    verdicts = [simulate(seed, off.scale, safeguards=broken, luck=off.luck) for seed in off.seeds]
    told = [violation.rule for verdict in verdicts for violation in verdict.violations]
    assert any(off.sentence in rule for rule in told)
    assert all(verdict.story for verdict in verdicts if not verdict.is_good)


@pytest.mark.parametrize("off", OFF, ids=lambda off: off.safeguard)
def test_with_the_safeguard_nothing_is_broken(off: Off):
    for seed in off.seeds:
        assert simulate(seed, off.scale, luck=off.luck).violations == ()
