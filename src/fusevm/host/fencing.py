"""Who may give orders: pure decisions over what the host has seen of an environment.

The control plane numbers machines of an environment (incarnation) and its own orders (action_seq). An order that was
delayed, or comes from a replica that no longer knows, carries an old number and is refused. Users of the contract
send no fence; to them belongs the cluster `local`, in which every machine id is an environment of its own.
"""

from __future__ import annotations

import msgspec

from fusevm.model.errors import BadField, MachineExists, StaleAction, StaleIncarnation, WrongCluster
from fusevm.model.machine import Fence, Machine

LOCAL = "local"


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

    def with_order(self, fence: Fence) -> Seen:
        """After an accepted order."""
        return Seen(
            incarnation=max(self.incarnation, fence.incarnation),
            action_seq=max(self.action_seq, fence.action_seq),
            ended=self.ended,
        )

    def with_deletion(self, fence: Fence) -> Seen:
        """After an accepted delete: the tombstone."""
        seen = self.with_order(fence)
        return msgspec.structs.replace(seen, ended=max(self.ended, fence.incarnation))


def check_reserved(fence: Fence | None) -> None:
    """Raise BadField for a fence that pretends to be a user of the contract."""
    if fence is not None and fence.cluster == LOCAL:
        raise BadField(field="fence", problem=f"the cluster id {LOCAL!r} is reserved for orders without a fence")


def check_cluster(bound: str, fence: Fence) -> None:
    """Raise WrongCluster when the host belongs to another cluster. `bound` is empty until the first order."""
    if fence.cluster != LOCAL and bound and fence.cluster != bound:
        raise WrongCluster(cluster=bound, asked=fence.cluster)


def check_new(seen: Seen, fence: Fence) -> None:
    """May a machine of this incarnation be made? Raises StaleIncarnation, StaleAction."""
    if fence.incarnation < seen.incarnation or fence.incarnation <= seen.ended:
        raise StaleIncarnation(uid=fence.uid, incarnation=fence.incarnation, seen=max(seen.incarnation, seen.ended))
    if fence.action_seq < seen.action_seq:
        raise StaleAction(uid=fence.uid, action_seq=fence.action_seq, seen=seen.action_seq)


def check_repeated(machine: Machine, fence: Fence) -> None:
    """Is an order to create `machine` a repetition? Raises MachineExists, StaleIncarnation."""
    own = machine.fence
    if (own.cluster, own.uid) != (fence.cluster, fence.uid) or own.incarnation < fence.incarnation:
        raise MachineExists(id=machine.id)
    if fence.incarnation < own.incarnation:
        raise StaleIncarnation(uid=fence.uid, incarnation=fence.incarnation, seen=own.incarnation)


def check_owner(machine: Machine, fence: Fence | None) -> None:
    """May whoever sends this fence use the machine? Raises WrongCluster, MachineExists, StaleIncarnation."""
    own = machine.fence
    asked = fence.cluster if fence is not None else LOCAL
    if own.cluster != asked:
        raise WrongCluster(cluster=own.cluster, asked=asked)
    if fence is None:
        return
    if own.uid != fence.uid:
        # It belongs to another environment: one of the two has made a mistake.
        raise MachineExists(id=machine.id)
    if fence.incarnation < own.incarnation:
        raise StaleIncarnation(uid=fence.uid, incarnation=fence.incarnation, seen=own.incarnation)


def check_order(machine: Machine, seen: Seen, fence: Fence | None) -> None:
    """May the machine be started or stopped by this order? Raises what `check_owner` raises, and StaleAction."""
    check_owner(machine, fence)
    if fence is not None and fence.action_seq < seen.action_seq:
        raise StaleAction(uid=fence.uid, action_seq=fence.action_seq, seen=seen.action_seq)
