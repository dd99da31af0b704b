"""What a create asked for, made complete: defaults filled in, bounds checked, spellings normalised.

0, "" and None mean unset, as the contract's SDK sends them. The completed Spec is what the answer echoes, what the
books reserve and what the host is asked to make: there is no second place that knows a default.
"""

import re
from collections.abc import Iterable, Mapping

from fusevm.core.policy import Policy
from fusevm.core.snapshots import check_seed
from fusevm.model.environment import Spec
from fusevm.model.errors import BadField
from fusevm.model.host import Resources
from fusevm.model.network import Exposure, Network, check_exposures, check_network
from fusevm.model.snapshot import Snapshot

UNLIMITED = -1
#: Least idle timeout, seconds: below it the watchers' own pace would decide.
MIN_IDLE_SECONDS = 60
#: Ten years: keeps every deadline far inside of 64 bits.
MAX_SECONDS = 315_360_000
MAX_TEXT = 512
MAX_LABELS = 64
#: A Kubernetes label token: 1 to 63 characters, letters and digits at both ends.
TOKEN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_GRAMMAR = "is not 1 to 63 letters, digits, '.', '_' and '-' that start and end with a letter or digit"
ARCHITECTURES = {"amd64": "amd64", "x86_64": "amd64", "arm64": "arm64", "aarch64": "arm64"}


_DEFAULT_NETWORK = Network()


def complete(
    policy: Policy,
    *,
    cpus: int | None = None,
    ram_mb: int | None = None,
    storage_gb: int | None = None,
    region: str | None = None,
    image: str | None = None,
    arch: str | None = None,
    host_id: str | None = None,
    labels: Mapping[str, str] | None = None,
    max_runtime_seconds: int | str | None = None,
    idle_timeout_seconds: int | None = None,
    network: Network = _DEFAULT_NETWORK,
    expose: Iterable[Exposure] = (),
    seed: Snapshot | None = None,
    queue_seconds: int | None = None,
) -> Spec:
    """Fill in defaults and check bounds. `seed` is the snapshot that the disk starts from; it brings its image along.

    Raises BadField, naming the field as the request spells it (`spec.cpus`), SnapshotNotReady, and WrongState.
    """
    return Spec(
        cpus=_amount("cpus", cpus, policy.default_cpus, 1, policy.max_cpus),
        ram_mb=_amount("ram_mb", ram_mb, policy.default_ram_mb, policy.min_ram_mb, policy.max_ram_mb),
        storage_gb=_amount("storage_gb", storage_gb, policy.default_storage_gb, 1, policy.max_storage_gb),
        region=_text("region", region),
        image=_image(image, seed, policy),
        arch=_arch(arch, seed),
        host_id=_text("host_id", host_id),
        labels=check_labels("spec.labels", labels or {}),
        max_runtime_seconds=_max_runtime(max_runtime_seconds, policy),
        idle_timeout_seconds=_amount(
            "idle_timeout_seconds",
            idle_timeout_seconds,
            policy.default_idle_timeout_seconds,
            MIN_IDLE_SECONDS,
            MAX_SECONDS,
        ),
        network=check_network(network),
        expose=check_exposures(expose),
        seed_snapshot_id=seed.id if seed is not None else "",
        queue_seconds=_amount("queue_seconds", queue_seconds, 0, 1, policy.max_queue_seconds),
    )


def resources_of(spec: Spec) -> Resources:
    """What one machine of this spec takes of a host."""
    return Resources(cpus=spec.cpus, ram_mb=spec.ram_mb, storage_gb=spec.storage_gb, vm_count=1)


def _amount(field: str, asked: int | None, default: int, least: int, most: int) -> int:
    if not asked:
        return default
    if not least <= asked <= most:
        raise _bad(field, f"{asked} is not within {least} to {most}")
    return asked


def _max_runtime(asked: int | str | None, policy: Policy) -> int:
    most = policy.longest_runtime_seconds or MAX_SECONDS
    if asked in ("unlimited", UNLIMITED):
        if not policy.allow_unlimited_runtime:
            raise _bad("max_runtime_seconds", f"this server allows no unlimited runtime; give 1 to {most}")
        return UNLIMITED
    if isinstance(asked, str) and asked:
        raise _bad("max_runtime_seconds", f"{asked[:80]!r} is neither a whole number nor 'unlimited'")
    number = asked if isinstance(asked, int) else None
    return _amount("max_runtime_seconds", number, policy.default_max_runtime_seconds, 1, most)


def _text(field: str, asked: str | None) -> str:
    text = asked or ""
    if len(text) > MAX_TEXT or not text.isprintable():
        raise _bad(field, f"use at most {MAX_TEXT} printable characters")
    return text


def _image(asked: str | None, seed: Snapshot | None, policy: Policy) -> str:
    image = _text("image", asked)
    if seed is None:
        return image or policy.default_image
    if image:
        raise _bad("image", "a snapshot brings its image along; give either seed_snapshot_id or an image")
    check_seed(seed)
    return seed.image or policy.default_image


def _arch(asked: str | None, seed: Snapshot | None) -> str:
    seeded = seed.arch if seed is not None else ""
    if not asked:
        return seeded
    found = ARCHITECTURES.get(asked.lower())
    if found is None:
        raise _bad("arch", f"{asked[:80]!r} is not known; use amd64 or arm64")
    if seeded not in ("", found):
        raise _bad("arch", f"the snapshot was taken on {seeded}; leave arch out")
    return found


def check_labels(field: str, labels: Mapping[str, str]) -> dict[str, str]:
    """The labels unchanged. Raises BadField naming `field`."""
    if len(labels) > MAX_LABELS:
        raise BadField(field=field, problem=f"{len(labels)} labels are more than {MAX_LABELS}")
    for key, value in labels.items():
        for token in (key, value):
            if not TOKEN.fullmatch(token):
                raise BadField(field=field, problem=f"{token[:80]!r} {_GRAMMAR}")
    return dict(labels)


def _bad(field: str, problem: str) -> BadField:
    return BadField(field=f"spec.{field}", problem=problem)
