"""How often a wrong token may be sent."""

import pytest

from fusevm.control import attempts
from fusevm.control.attempts import BURST, REFILL_S, Attempts
from fusevm.model.errors import RateLimited

GOOD, BAD = b"good", b"bad"


class Time:
    """A clock by hand."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def _exhaust(limiter: Attempts, address: str) -> None:
    for _ in range(BURST):
        limiter.check(address, BAD)
        limiter.failed(address)


def test_after_a_burst_one_address_waits_and_others_do_not() -> None:
    limiter = Attempts(Time())
    _exhaust(limiter, "a")
    with pytest.raises(RateLimited) as caught:
        limiter.check("a", BAD)
    assert caught.value.retry_after_s == REFILL_S
    limiter.check("b", BAD)


def test_attempts_come_back_one_by_one_and_not_beyond_the_burst() -> None:
    time = Time()
    limiter = Attempts(time)
    _exhaust(limiter, "a")
    time.now_s += REFILL_S
    limiter.check("a", BAD)
    limiter.failed("a")
    with pytest.raises(RateLimited):
        limiter.check("a", BAD)
    time.now_s += 1e6
    _exhaust(limiter, "a")
    with pytest.raises(RateLimited):
        limiter.check("a", BAD)


def test_a_token_that_was_good_from_there_passes_meanwhile() -> None:
    limiter = Attempts(Time())
    limiter.succeeded("a", GOOD)
    _exhaust(limiter, "a")
    limiter.check("a", GOOD)
    _exhaust(limiter, "b")
    with pytest.raises(RateLimited):
        limiter.check("b", GOOD)


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "MAX_REMEMBERED", 3)
    limiter = Attempts(Time())
    _exhaust(limiter, "first")
    for number in range(5):
        limiter.failed(f"other-{number}")
        limiter.succeeded(f"other-{number}", GOOD)
    assert len(limiter._left) == len(limiter._good) == 3
    limiter.check("first", BAD)
