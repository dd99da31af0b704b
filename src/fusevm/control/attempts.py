"""How often one address may send a wrong token: a bucket of attempts that fills up again slowly.

In memory and bounded, so that a flood of failures costs a constant and no write. Per replica: N replicas let N times as
many through, which is still far too few to guess a token.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable

from fusevm.model.errors import RateLimited

#: Wrong tokens at once, and seconds until one more is allowed.
BURST, REFILL_S = 10, 6.0
#: Addresses, and tokens that were good, which are remembered; the longest unused are forgotten.
MAX_REMEMBERED = 10_000


class Attempts:
    """Counts failures by address."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        #: Address to (attempts left, when that was so).
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._good: OrderedDict[Hashable, None] = OrderedDict()

    def check(self, address: str, token_digest: bytes) -> None:
        """Raises RateLimited before anything is compared. A token that was good from this address is not refused, so
        that one program with an old token does not lock out everybody behind the same proxy."""
        left = self._refilled(address)
        if left < 1 and (address, token_digest) not in self._good:
            raise RateLimited(retry_after_s=math.ceil((1 - left) * REFILL_S))

    def failed(self, address: str) -> None:
        """Count a wrong token."""
        self._left[address] = (max(0.0, self._refilled(address) - 1), self._now_s())
        _keep_newest(self._left, address)

    def succeeded(self, address: str, token_digest: bytes) -> None:
        """Remember a good token."""
        self._good[address, token_digest] = None
        _keep_newest(self._good, (address, token_digest))

    def _refilled(self, address: str) -> float:
        left, at_s = self._left.get(address, (float(BURST), 0.0))
        return min(float(BURST), left + (self._now_s() - at_s) / REFILL_S)


def _keep_newest(table: "OrderedDict[Hashable, None] | OrderedDict[str, tuple[float, float]]", name: Hashable) -> None:
    table.move_to_end(name)  # type: ignore[arg-type]  # the key was just written to this very table
    if len(table) > MAX_REMEMBERED:
        table.popitem(last=False)
