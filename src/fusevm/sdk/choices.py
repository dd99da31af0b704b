"""What clients choose by themselves: keys, names, and how long to wait before the next look."""

import secrets
import time
from collections.abc import Iterator

from fusevm.model.errors import Timeout

_POLL_S = (0.05, 0.1, 0.2, 0.5, 1.0)


def make_key() -> str:
    """A fresh Idempotency-Key."""
    return secrets.token_hex(16)


def make_task_id(prefix: str = "env") -> str:
    """A fresh task id for whoever does not care."""
    return f"{prefix}-{secrets.token_hex(4)}"


def looks(what: str, limit_s: float) -> Iterator[float]:
    """Seconds to wait before each further look at something slow: soon at first, then every second.

    Raises Timeout when the limit is over.
    """
    ends_at = time.monotonic() + limit_s
    count = 0
    while time.monotonic() <= ends_at:
        yield _POLL_S[min(count, len(_POLL_S) - 1)]
        count += 1
    raise Timeout(what=what, limit_s=round(limit_s))
