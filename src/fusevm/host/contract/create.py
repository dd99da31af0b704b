"""What a create of computer-host's API means: a spec with that API's defaults, keys, and an image.

Owns: the reading of the body. Must not: make machines, or fetch what it names (`Importer` does).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from fusevm.host.contract.host_key import make_host_key
from fusevm.host.contract.keys import parse_keys
from fusevm.host.images.store import Image
from fusevm.host.machines import check_spec
from fusevm.model.errors import BadField, Unimplemented
from fusevm.model.ids import parse_machine_id
from fusevm.model.machine import Artifact, Contract, Fence, Login, MachineSpec
from fusevm.model.network import Exposure
from fusevm.wire.contract import (
    DEFAULT_CPUS,
    DEFAULT_MEMORY_MIB,
    DEFAULT_STORAGE_BYTES,
    ArtifactBody,
    CreateContractMachine,
    GuestConfig,
)
from fusevm.wire.decode import UNREADABLE
from fusevm.wire.host_api import CreateMachine

#: A full distribution may take this long in software emulation.
BOOT_TIMEOUT_MS = 60_000


class Importer(Protocol):
    """Makes images of what is at URLs."""

    async def import_artifact(self, rootfs_url: str, *, sha256: str | None = None) -> Image:
        """Return the image of a root file system's URL. Bounded in size, time and addresses."""
        ...


class _Form(msgspec.Struct, frozen=True):
    """What tells the two forms of a create apart."""

    spec: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    artifact: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    image: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def is_contract_form(body: bytes) -> bool:
    """Is this the contract's form (`artifact`, or our `image`), not Fuse's own (`spec`)? Raises BadField for both.

    What is no JSON object is left to whoever decodes Fuse's own form.
    """
    try:
        form = msgspec.json.decode(body, type=_Form)
    except UNREADABLE:
        return False
    is_contract = form.artifact is not msgspec.UNSET or form.image is not msgspec.UNSET
    if is_contract and form.spec is not msgspec.UNSET:
        problem = "a machine is described by `spec` (Fuse's own form) or by `artifact` (computer-host's), not by both"
        raise BadField(field="spec", problem=problem)
    return is_contract


async def plan_create(
    body: CreateContractMachine,
    fence: Fence | None,
    *,
    importer: Importer,
    login_ca: str,
    relays: tuple[Exposure, ...],
    entropy: Callable[[int], bytes],
) -> tuple[CreateMachine, Contract]:
    """Read a create, fetching its image. Raises BadField, Unimplemented, or why there is no image.

    `login_ca` is the authority that every machine of this host trusts first; empty: none. `relays` are forwarded.
    """
    parse_machine_id(body.machine_id)
    if fence is not None:
        problem = "an order with a fence describes its machine by `spec`; computer-host's form goes without a fence"
        raise BadField(field="fence", problem=problem)
    _check_served(body)
    guest = body.guest_config
    authorities = [*([login_ca] if login_ca else []), *guest.trusted_user_ca_keys]
    authorized = parse_keys(guest.authorized_keys, "guest_config.authorized_keys")
    trusted = parse_keys(authorities, "guest_config.trusted_user_ca_keys")
    artifact = _parse_artifact(body)
    # Before minutes of downloading.
    check_spec(render_spec(body, body.image or "artifact", guest, relays))
    image = body.image if artifact is None else await _import(artifact, importer)
    private, public = make_host_key(entropy(32))
    login = Login(host_key=private, host_public_key=public, authorized_keys=authorized, trusted_user_ca_keys=trusted)
    kept = None
    if artifact is not None:
        kept = Artifact(kernel_image_url=artifact.kernel_image_url, rootfs_url=artifact.rootfs_url)
    create = CreateMachine(
        machine_id=body.machine_id, spec=render_spec(body, image, guest, relays), boot_timeout_ms=BOOT_TIMEOUT_MS
    )
    return create, Contract(artifact=kept, login=login)


def render_spec(
    body: CreateContractMachine, image: str, guest: GuestConfig, relays: tuple[Exposure, ...] = ()
) -> MachineSpec:
    """The machine with this API's defaults, which hold for no other."""
    return MachineSpec(
        image=image,
        cpus=DEFAULT_CPUS,
        memory_mib=body.memory_mib if body.memory_mib > 0 else DEFAULT_MEMORY_MIB,
        disk_bytes=body.storage_bytes if body.storage_bytes > 0 else DEFAULT_STORAGE_BYTES,
        hostname=guest.hostname,
        expose=relays,
    )


def _check_served(body: CreateContractMachine) -> None:
    if body.user_volume_ids:
        raise Unimplemented(feature="user_volume_ids", why="this host keeps no volumes apart from machines' own disks")
    if body.guest_config.login_webhook is not None:
        raise Unimplemented(feature="guest_config.login_webhook", why="guests of this host report no logins")


def _parse_artifact(body: CreateContractMachine) -> ArtifactBody | None:
    artifact = body.artifact
    if artifact is None:
        return None
    if body.image:
        raise BadField(field="image", problem="give `artifact` or `image`, not both")
    for field, url in (("kernel_image_url", artifact.kernel_image_url), ("rootfs_url", artifact.rootfs_url)):
        scheme, separator, rest = url.partition("://")
        if scheme.lower() not in ("http", "https") or not separator or rest[:1] in ("", "/", ":", "?", "#"):
            raise BadField(field=f"artifact.{field}", problem="must be an http or https URL with a host")
    return artifact


async def _import(artifact: ArtifactBody, importer: Importer) -> str:
    """The digest of the image."""
    return (await importer.import_artifact(artifact.rootfs_url, sha256=artifact.rootfs_sha256 or None)).digest
