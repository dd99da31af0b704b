"""How long to wait before the next attempt. Deterministic: jitter comes from the key, not from a random generator."""

import zlib


def backoff_ms(attempt: int, *, first_ms: int, max_ms: int, key: str) -> int:
    """Delay before attempt number `attempt` (1 = first repetition): doubled each time, capped, spread by +-25 %.

    The spread is a function of `key` and `attempt`, so that replays are exact and neighbours do not march in step.
    """
    delay = min(max_ms, first_ms << min(attempt - 1, 30))
    spread = zlib.crc32(f"{key}:{attempt}".encode()) % 501 - 250
    return delay + delay * spread // 1000
