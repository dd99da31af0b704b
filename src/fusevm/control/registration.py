"""What a registration of a host over the API is worth: the host is asked who it is, and what was declared is compared.

A host that answers is believed about everything that was not declared. One that does not answer is accepted only when
its whole capacity is declared: it may be installed later.
"""

import re
from typing import Protocol

import msgspec

from fusevm.control.config import ControlConfig, check_host_url, check_registered_url
from fusevm.core.spec import ARCHITECTURES, check_labels
from fusevm.model.errors import BadField, BadSetting, HostMismatch, HostUnreachable, Timeout, Unimplemented
from fusevm.model.host import Host, Resources, effective
from fusevm.wire.host_api import HostFacts
from fusevm.wire.rest_fleet import CapacityInput, RegisterHost

HOST_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_AMOUNTS = ("cpus", "ram_mb", "storage_gb", "vm_count")


class Accepted(msgspec.Struct, frozen=True):
    """A registration that holds: the record as declared and seen, its token, and what looks wrong."""

    host: Host
    token: str
    warnings: tuple[str, ...]


class Prober(Protocol):
    """Asks a host that is not registered yet."""

    async def probe(self, id: str, url: str, token: str) -> HostFacts:  # noqa: A002 - the record's field
        """Who it is. Raises HostUnreachable, HostRejected, Timeout, WrongCluster."""
        ...


async def accept_host(body: RegisterHost, prober: Prober, config: ControlConfig) -> Accepted:
    """Check and probe. Raises BadField, Unimplemented, HostMismatch, HostRejected, HostUnreachable, Timeout."""
    declared = _checked(body, config)
    try:
        facts = await prober.probe(body.id, body.url, body.token or "")
    except (HostUnreachable, Timeout) as error:
        if not all(getattr(declared, name) for name in _AMOUNTS):
            raise
        warnings = (f"the host does not answer ({error.message}); it is taken as declared until it does",)
        return Accepted(_record(body, declared, None), body.token or "", warnings)
    return Accepted(_record(body, declared, facts), body.token or "", _compare(body, declared, facts))


def _checked(body: RegisterHost, config: ControlConfig) -> Resources:
    if not HOST_ID.fullmatch(body.id):
        raise BadField(
            field="id", problem="use 1 to 63 letters, digits, '.', '_' and '-', a letter or digit at both ends"
        )
    if body.backend not in (None, "", "firecracker", "qemu"):
        raise BadField(field="backend", problem=f"{body.backend[:40]!r} is not firecracker or qemu")
    try:
        check_host_url(body.url, body.token or "")
        check_registered_url(config, body.id, body.url)
    except BadSetting as error:
        raise BadField(field=_field_of(error), problem=error.problem) from error
    check_labels("labels", body.labels or {})
    return _amounts(body.capacity or CapacityInput())


def _field_of(error: BadSetting) -> str:
    return "token" if "token" in error.setting else "url"


def _amounts(asked: CapacityInput) -> Resources:
    if asked.gpus or asked.gpu_kind:
        raise Unimplemented(feature="the field capacity.gpus", why="machines with GPUs are not built yet; leave it out")
    values = {name: getattr(asked, name) or 0 for name in _AMOUNTS}
    for name, value in values.items():
        if not 0 <= value < 1 << 40:
            raise BadField(field=f"capacity.{name}", problem=f"{value} is not a sensible amount")
    if asked.arch and asked.arch.lower() not in ARCHITECTURES:
        raise BadField(field="capacity.arch", problem=f"{asked.arch[:40]!r} is not known; use amd64 or arm64")
    return Resources(**values)


def _record(body: RegisterHost, declared: Resources, facts: HostFacts | None) -> Host:
    asked_arch = ARCHITECTURES.get(((body.capacity or CapacityInput()).arch or "").lower(), "")
    if facts is not None and asked_arch and ARCHITECTURES.get(facts.arch, facts.arch) != asked_arch:
        raise HostMismatch(id=body.id, field="arch", reported=facts.arch, declared=asked_arch)
    return Host(
        id=body.id,
        url=body.url,
        region=body.region or "",
        labels=body.labels or {},
        arch=facts.arch if facts is not None else asked_arch or "amd64",
        declared=declared,
        capacity=effective(declared, facts.capacity if facts is not None else Resources()),
        created_at_ms=0,
        updated_at_ms=0,
    )


def _compare(body: RegisterHost, declared: Resources, facts: HostFacts) -> tuple[str, ...]:
    found = []
    for name in _AMOUNTS:
        said, seen = getattr(declared, name), getattr(facts.capacity, name)
        if said and said != seen:
            found.append(f"capacity.{name}: {said} is declared and will be used, the host reports {seen}")
    if body.backend and body.backend != facts.driver:
        found.append(f"backend {body.backend!r} is declared, the host uses {facts.driver!r}")
    return tuple(found)
