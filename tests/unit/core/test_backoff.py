"""Pauses between attempts."""

from fusevm.core.backoff import backoff_ms


def test_pauses_double_up_to_the_cap_within_a_quarter():
    for attempt in range(1, 200):
        plain = min(30_000, 250 << min(attempt - 1, 20))
        assert plain * 3 // 4 <= backoff_ms(attempt, first_ms=250, max_ms=30_000, key="k") <= plain * 5 // 4


def test_the_same_attempt_of_the_same_key_always_waits_alike_and_neighbours_differ():
    first = [backoff_ms(3, first_ms=1000, max_ms=60_000, key=f"k{n}") for n in range(20)]
    assert first == [backoff_ms(3, first_ms=1000, max_ms=60_000, key=f"k{n}") for n in range(20)]
    assert len(set(first)) > 10
