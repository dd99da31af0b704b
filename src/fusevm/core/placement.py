"""Where a machine goes: which hosts can take it, which of them is best, and whether it still fits when booked.

Plan, then apply: `place` plans on a reading of the hosts that may be old; the store then books the reservation in one
transaction under `can_reserve`, and a loser plans again. Pure and deterministic: equal scores are decided by host id.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from fusevm.core.policy import Policy
from fusevm.core.spec import ARCHITECTURES, resources_of
from fusevm.model.environment import Spec
from fusevm.model.errors import BadField, HostNotFound, ImageNotFound, NoCapacity, NoHosts, SnapshotNotReady
from fusevm.model.host import Host, HostHealth, HostState, Resources

#: Names of images in an error.
_MOST_KNOWN = 12

#: What a host that is known to have the image is ahead by: more than any difference in load.
LOCALITY = 2.0


def limits(host: Host, policy: Policy) -> Resources:
    """How much may be reserved on a host: capacity times the overcommit ratios. Machines are never overcommitted."""
    capacity = host.capacity
    return Resources(
        cpus=capacity.cpus * policy.cpu_overcommit_percent // 100,
        ram_mb=capacity.ram_mb * policy.ram_overcommit_percent // 100,
        storage_gb=capacity.storage_gb * policy.storage_overcommit_percent // 100,
        vm_count=capacity.vm_count,
    )


def rejection(host: Host, spec: Spec, policy: Policy) -> str | None:
    """The first gate that a host fails, as a stable word, or None when it can take the machine."""
    most = limits(host, policy)
    return next((reason for reason, lets_through in _GATES if not lets_through(host, spec, most)), None)


def can_reserve(host: Host, spec: Spec, policy: Policy) -> bool:
    """May the reservation be booked on the host as it is *now*? The condition of the booking transaction."""
    return rejection(host, spec, policy) is None


def score(host: Host, spec: Spec, policy: Policy) -> float:
    """How good a feasible host is; higher is better. Image locality first, then load after placement.

    Load is the dominant share: the largest reserved fraction among cpus, memory, disk and machines, so that hosts of
    different sizes compare. `spread` prefers a low one, `binpack` a high one.
    """
    after, most = host.allocated.plus(resources_of(spec)), limits(host, policy)
    share = max(
        _share(after.cpus, most.cpus),
        _share(after.ram_mb, most.ram_mb),
        _share(after.storage_gb, most.storage_gb),
        _share(after.vm_count, most.vm_count),
    )
    locality = LOCALITY if spec.image in host.images else 0.0
    return locality + (share if policy.placement == "binpack" else 1.0 - share)


def best(hosts: Sequence[Host], spec: Spec, policy: Policy) -> Host | None:
    """The feasible host with the highest score; None: none can take it."""
    feasible = [host for host in hosts if can_reserve(host, spec, policy)]
    return min(feasible, key=lambda host: (-score(host, spec, policy), host.id), default=None)


def place(hosts: Sequence[Host], spec: Spec, policy: Policy, *, pinned_to: str = "", kept_free: str = "") -> str:
    """Choose a host and return its id. `pinned_to`: where the bytes of the seed snapshot are; `kept_free`: the host
    that is not to be chosen, since somebody waits for it (`core.queue`).

    Raises HostNotFound for a pin on an unknown host, BadField for a pin elsewhere than the snapshot, SnapshotNotReady
    when the snapshot's host is gone, NoHosts, ImageNotFound when no host that is asked has the image, and NoCapacity
    with the number of hosts per reason.
    """
    asked = _pinned(hosts, spec, pinned_to)
    if not asked:
        raise NoHosts
    chosen = best([host for host in asked if host.id != kept_free], spec, policy)
    if chosen is not None:
        return chosen.id
    if not any(_has_image(host, spec, limits(host, policy)) for host in asked):
        raise ImageNotFound(image=spec.image, known=_known_images(asked))
    raise NoCapacity(rejections=_count(asked, spec, policy))


def _known_images(hosts: Sequence[Host]) -> str:
    """Names, not digests, of what the hosts have."""
    names = sorted({name for host in hosts for name in host.images if not name.startswith("sha256:")})
    more = f" and {len(names) - _MOST_KNOWN} more" if len(names) > _MOST_KNOWN else ""
    return (", ".join(names[:_MOST_KNOWN]) or "none") + more


def _pinned(hosts: Sequence[Host], spec: Spec, pinned_to: str) -> Sequence[Host]:
    """The hosts that may be asked at all."""
    if spec.host_id:
        hosts = [host for host in hosts if host.id == spec.host_id]
        if not hosts:
            raise HostNotFound(id=spec.host_id)
    if not pinned_to:
        return hosts
    if spec.host_id not in ("", pinned_to):
        problem = f"snapshot {spec.seed_snapshot_id} is on host {pinned_to}; name that one, or none"
        raise BadField(field="spec.host_id", problem=problem)
    hosts = [host for host in hosts if host.id == pinned_to]
    if not hosts:
        raise SnapshotNotReady(id=spec.seed_snapshot_id, state=f"on host {pinned_to}, which is not registered")
    return hosts


def _count(hosts: Sequence[Host], spec: Spec, policy: Policy) -> str:
    counts = Counter(_in_words(host, rejection(host, spec, policy) or "") for host in hosts)
    return ", ".join(f"{count} {word}" for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _in_words(host: Host, reason: str) -> str:
    """For people: say `cordoned` or `lost` rather than `not_active` or `unhealthy`."""
    return {"not_active": str(host.state), "unhealthy": str(host.health), "": "kept_for_queue"}.get(reason, reason)


def _share(amount: int, limit: int) -> float:
    return min(1.0, amount / limit) if limit > 0 else 1.0


# -- gates ---------------------------------------------------------------------------------------------------------


def _is_active(host: Host, _spec: Spec, _most: Resources) -> bool:
    return host.state is HostState.ACTIVE


def _is_healthy(host: Host, _spec: Spec, _most: Resources) -> bool:
    return host.health is HostHealth.OK


def _has_region(host: Host, spec: Spec, _most: Resources) -> bool:
    return spec.region in ("", host.region)


def _has_arch(host: Host, spec: Spec, _most: Resources) -> bool:
    return spec.arch in ("", ARCHITECTURES.get(host.arch, host.arch))


def _has_labels(host: Host, spec: Spec, _most: Resources) -> bool:
    return spec.labels.items() <= host.labels.items()


def _is_wanted(host: Host, spec: Spec, _most: Resources) -> bool:
    return spec.host_id in ("", host.id)


def _has_memory(host: Host, spec: Spec, most: Resources) -> bool:
    return host.allocated.ram_mb + spec.ram_mb <= most.ram_mb


def _has_cpus(host: Host, spec: Spec, most: Resources) -> bool:
    return host.allocated.cpus + spec.cpus <= most.cpus


def _has_disk(host: Host, spec: Spec, most: Resources) -> bool:
    return host.allocated.storage_gb + spec.storage_gb <= most.storage_gb


def _has_machine_left(host: Host, _spec: Spec, most: Resources) -> bool:
    return host.allocated.vm_count < most.vm_count


def _has_image(host: Host, spec: Spec, _most: Resources) -> bool:
    """A host that has not told its images yet may have any."""
    return not host.images or spec.image in host.images


#: In this order; memory before the rest of the sizes, since it is what runs out first.
_GATES: tuple[tuple[str, Callable[[Host, Spec, Resources], bool]], ...] = (
    ("not_active", _is_active),
    ("unhealthy", _is_healthy),
    ("region", _has_region),
    ("arch", _has_arch),
    ("labels", _has_labels),
    ("pinned_elsewhere", _is_wanted),
    ("memory", _has_memory),
    ("cpu", _has_cpus),
    ("disk", _has_disk),
    ("machine_count", _has_machine_left),
    ("image", _has_image),
)
