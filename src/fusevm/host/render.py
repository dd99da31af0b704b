"""Records to bodies. Pure."""

from __future__ import annotations

import datetime as dt

from fusevm.host.images.store import Image
from fusevm.model.machine import Machine
from fusevm.wire.host_api import ImageBody, MachineAnswer, MachineBody


def render_time(at_ms: int | None) -> str:
    """RFC 3339 in UTC with milliseconds; empty for None."""
    if at_ms is None:
        return ""
    moment = dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def render_machine(machine: Machine) -> MachineBody:
    """A machine without its secrets."""
    return MachineBody(
        id=machine.id,
        cluster=machine.fence.cluster,
        uid=machine.fence.uid,
        incarnation=machine.fence.incarnation,
        phase=machine.phase,
        spec=machine.spec,
        image_digest=machine.image_digest,
        driver=machine.driver,
        isolation=machine.isolation,
        address=machine.address,
        generation=machine.generation,
        timings=machine.timings,
        error=machine.error,
        created_at=render_time(machine.created_at_ms),
        started_at=render_time(machine.started_at_ms),
    )


def render_answer(machine: Machine) -> MachineAnswer:
    """The body of every answer about one machine."""
    return MachineAnswer(machine=render_machine(machine))


def render_image(image: Image) -> ImageBody:
    """An image as the API shows it."""
    return ImageBody(
        digest=image.digest,
        names=list(image.names),
        size_bytes=image.record.size_bytes,
        created_at=render_time(image.record.created_at_ms),
    )
