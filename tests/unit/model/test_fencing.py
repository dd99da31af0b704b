"""Which orders a host still takes."""

import pytest

from fusevm.model.errors import OrderExpired, StaleAction, StaleIncarnation
from fusevm.model.fencing import Seen, check_new, check_number, check_valid
from fusevm.model.machine import Fence, Moment


def order(incarnation: int = 1, action_seq: int = 1, until: Moment | None = None) -> Fence:
    return Fence(cluster="c1", uid="u1", incarnation=incarnation, action_seq=action_seq, valid_until=until)


@pytest.mark.parametrize(
    "until",
    [Moment(clock="boot", ms=100), Moment(clock="boot", ms=99), Moment(clock="the boot before", ms=1 << 40)],
    ids=["at the end", "after it", "of another clock"],
)
def test_what_comes_too_late_is_refused(until):
    with pytest.raises(OrderExpired):
        check_valid(order(until=until), Moment(clock="boot", ms=100))


@pytest.mark.parametrize("until", [None, Moment(clock="boot", ms=101)])
def test_what_comes_in_time_is_taken(until):
    check_valid(order(until=until), Moment(clock="boot", ms=100))


@pytest.mark.parametrize(
    ("seen", "refusal"),
    [
        (Seen(incarnation=3), StaleIncarnation),
        (Seen(incarnation=2, ended=2), StaleIncarnation),
        (Seen(incarnation=2, action_seq=6), StaleAction),
    ],
    ids=["an older machine", "a deleted one", "an older order"],
)
def test_no_machine_is_made_by_what_is_out_of_date(seen, refusal):
    with pytest.raises(refusal):
        check_new(seen, order(incarnation=2, action_seq=5))


def test_the_newest_order_and_its_repetition_are_taken():
    seen = Seen().with_order(order(incarnation=2, action_seq=5))
    assert seen == Seen(incarnation=2, action_seq=5)
    check_new(seen, order(incarnation=2, action_seq=5))
    check_number(seen, order(incarnation=2, action_seq=6))


def test_a_deletion_ends_its_machine_and_all_older_ones():
    seen = Seen().with_order(order(incarnation=2, action_seq=5)).with_deletion(order(incarnation=1, action_seq=9))
    assert seen == Seen(incarnation=2, action_seq=9, ended=1)
    check_new(seen, order(incarnation=2, action_seq=9))
    assert seen.with_deletion(order(incarnation=4)).next_local == 5
