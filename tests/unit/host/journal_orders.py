"""Orders to a journal, and what they are made of."""

import msgspec

from fusevm.host.admission import Limits
from fusevm.host.journal import Journal
from fusevm.host.rows import Draft, Numbers
from fusevm.model.machine import Fence, Isolation, Machine, MachineSpec, Phase

GIB = 1 << 30
LIMITS = Limits(
    max_machines=100,
    cpus=32,
    cpu_ratio=4.0,
    memory_mib=32 << 10,
    overhead_mib=100,
    disk_bytes=100 * GIB,
    disk_ratio=4.0,
    disk_free_bytes=100 * GIB,
    disk_reserve_bytes=GIB,
)
NUMBERS = Numbers(warm_slots=(7,), slot_count=50, uid_base=200_000, uid_count=50)
SPEC = MachineSpec(image="debian-12", memory_mib=256, disk_bytes=GIB)


class Time:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


def fence(uid: str = "u1", incarnation: int = 1, action_seq: int = 1, cluster: str = "c1") -> Fence:
    return Fence(cluster=cluster, uid=uid, incarnation=incarnation, action_seq=action_seq)


def draft(machine_id: str = "m-1", spec: MachineSpec = SPEC) -> Draft:
    return Draft(
        id=machine_id,
        spec=spec,
        image_digest="sha256:1",
        kernel_digest="2",
        driver="fake",
        isolation=Isolation.NAMESPACE,
        nonce="ab",
        deadline_ms=0,
    )


def nothing(_value: object) -> None:
    """No callback."""


async def create(journal: Journal, order: Fence | None, machine_id: str = "m-1", spec: MachineSpec = SPEC) -> Machine:
    return await journal.begin_create(draft(machine_id, spec), order, LIMITS, NUMBERS, nothing)


async def create_running(journal: Journal, order: Fence | None, machine_id: str = "m-1") -> Machine:
    machine = await create(journal, order, machine_id)
    running = msgspec.structs.replace(machine, phase=Phase.RUNNING)
    return await journal.finish(running, "create", "running", nothing)


async def delete(journal: Journal, order: Fence | None, machine_id: str = "m-1") -> None:
    if await journal.begin_delete(machine_id, order, nothing) is not None:
        await journal.forget(machine_id, "delete", "gone", nothing)


async def start(journal: Journal, order: Fence | None) -> Machine:
    return await journal.begin_start("m-1", order, LIMITS, NUMBERS, "cd", 0, nothing)
