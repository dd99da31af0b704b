"""Whose a machine is: pure decisions over its record and what the host has seen (`model.fencing`).

Users of the contract send no fence; to them belongs the cluster `local`, in which every machine id is an environment of
its own.
"""

from fusevm.model.errors import BadField, MachineExists, StaleIncarnation, WrongCluster
from fusevm.model.fencing import Seen, check_number
from fusevm.model.machine import Fence, Machine

LOCAL = "local"


def check_reserved(fence: Fence | None) -> None:
    """Raise BadField for a fence that pretends to be a user of the contract."""
    if fence is not None and fence.cluster == LOCAL:
        raise BadField(field="fence", problem=f"the cluster id {LOCAL!r} is reserved for orders without a fence")


def check_cluster(bound: str, fence: Fence) -> None:
    """Raise WrongCluster when the host belongs to another cluster. `bound` is empty until the first order."""
    if fence.cluster != LOCAL and bound and fence.cluster != bound:
        raise WrongCluster(cluster=bound, asked=fence.cluster)


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
    """May something be done to the machine by this order? Raises what `check_owner` raises, and StaleAction.

    Not asked for a deletion: nothing takes that back, so it is never out of date.
    """
    check_owner(machine, fence)
    if fence is not None:
        check_number(seen, fence)
