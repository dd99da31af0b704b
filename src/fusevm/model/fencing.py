"""Which orders a host still takes: pure decisions over what it has seen of an environment, and over its own clock.

The control plane numbers the machines of an environment (incarnation) and its own orders (action_seq), and says until
when each order may be taken up. What was delayed, or comes from a replica that no longer knows, is refused. The rules
are the same for the host daemon, the stub host and the hosts of tests.
"""

import msgspec

from fusevm.model.errors import OrderExpired, StaleAction, StaleIncarnation
from fusevm.model.machine import Fence, Moment


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What the host has seen of one environment."""

    #: Highest; 0: nothing.
    incarnation: int = 0
    action_seq: int = 0
    #: Highest incarnation whose deletion was ordered; 0: none.
    ended: int = 0

    @property
    def next_local(self) -> int:
        """Incarnation of the next machine that a user of the contract makes under this id."""
        return max(self.incarnation, self.ended) + 1

    def with_order(self, fence: Fence) -> "Seen":
        """After an accepted order."""
        return Seen(
            incarnation=max(self.incarnation, fence.incarnation),
            action_seq=max(self.action_seq, fence.action_seq),
            ended=self.ended,
        )

    def with_deletion(self, fence: Fence) -> "Seen":
        """After an accepted delete: the tombstone."""
        seen = self.with_order(fence)
        return msgspec.structs.replace(seen, ended=max(self.ended, fence.incarnation))


def check_valid(fence: Fence, now: Moment) -> None:
    """May the order still be taken up? Ask in the moment in which it takes effect. Raises OrderExpired.

    A moment of another clock (the host was restarted since) is past.
    """
    until = fence.valid_until
    if until is not None and (until.clock != now.clock or until.ms <= now.ms):
        raise OrderExpired(uid=fence.uid, action_seq=fence.action_seq)


def check_new(seen: Seen, fence: Fence) -> None:
    """May a machine of this incarnation be made? Raises StaleIncarnation, StaleAction."""
    if fence.incarnation < seen.incarnation or fence.incarnation <= seen.ended:
        raise StaleIncarnation(uid=fence.uid, incarnation=fence.incarnation, seen=max(seen.incarnation, seen.ended))
    check_number(seen, fence)


def check_number(seen: Seen, fence: Fence) -> None:
    """Is the order the newest that was seen, or newer? The same one again is a repetition. Raises StaleAction."""
    if fence.action_seq < seen.action_seq:
        raise StaleAction(uid=fence.uid, action_seq=fence.action_seq, seen=seen.action_seq)
