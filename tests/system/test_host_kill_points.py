"""A daemon process that dies by SIGKILL at every kill point of every operation, over real namespaces, rules, control
groups and disks; VMMs are small processes (`fusevm.testing.agent_driver`). Its next run finishes the operation or
undoes it, and then registry and host agree.

The points are those that the code has (`host.faults`): one that is added there has to be reached here, and one that is
reached without being listed fails the test.
"""

import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from real_host import Guest, Host, make_fence, until

from artefacts import IMAGE
from fusevm.host.disk.qcow2 import CLUSTER, Run, render_head
from fusevm.host.faults import POINTS
from fusevm.host.vmm.driver import JAIL
from fusevm.model.errors import BootFailed, Error, SnapshotFailed, SnapshotNotFound
from fusevm.model.machine import Fence
from fusevm.testing.agent_daemon import FAULT, UNKNOWN
from fusevm.testing.agent_driver import HELD, MUTE, REFUSE
from fusevm.testing.held_disk import HeldDisk
from fusevm.wire.host_api import CLUSTER_HEADER, MachineBody
from fusevm.wire.host_snapshots import SnapshotList

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

SPEC = {"memory_mib": 64, "disk_bytes": 64 << 20}
ID = "m-1"
Deed = Callable[[Host, "Order"], Awaitable[object]]


class Order:
    """Orders of one environment, numbered; or those of who speaks the contract of the machine API, who has no fence."""

    def __init__(self, uid: str, *, is_local: bool) -> None:
        self._uid = uid
        self._seq = 0
        self._is_local = is_local

    @property
    def next(self) -> Fence | None:
        self._seq += 1
        return self.now

    @property
    def snapshot(self) -> str:
        """Id of its snapshot: ids are never used again."""
        return f"s-{self._uid}"

    @property
    def now(self) -> Fence | None:
        """The newest order, once more."""
        return None if self._is_local else make_fence(self._uid, 1, self._seq)

    @property
    def owner(self) -> dict[str, str]:
        """Who deletes a snapshot."""
        return {} if self._is_local else {CLUSTER_HEADER: make_fence(self._uid).cluster}


# -- what leads to a point --------------------------------------------------------------------------------------------


async def create(host: Host, order: Order) -> MachineBody:
    return await host.create(ID, order.next, **SPEC)


async def stop(host: Host, order: Order) -> None:
    await host.ask("POST", f"/machines/{ID}/stop", order.next)


async def start(host: Host, order: Order) -> None:
    await host.ask("POST", f"/machines/{ID}/start", order.next)


async def delete(host: Host, order: Order) -> None:
    await host.delete(ID, order.next)


async def change_network(host: Host, order: Order) -> None:
    await host.ask("PUT", f"/machines/{ID}/network", order.next, b'{"internet":false}')


async def publish_and_unpublish(host: Host, order: Order) -> None:
    path = f"/machines/{ID}/published-ports"
    await host.ask("POST", path, order.next, b'{"published_port_id":"web","port":80}')
    await host.ask("DELETE", f"{path}/web", order.next)


async def publish_in_vain(host: Host, order: Order) -> None:
    """The host lets nobody switch its links to answer on loopback."""
    host.box.run("mount", "--bind", "-o", "ro", "/proc/sys", "/proc/sys")
    try:
        with pytest.raises(Error):
            await publish_and_unpublish(host, order)
    finally:
        host.box.run("umount", "/proc/sys")


async def create_in_vain(host: Host, order: Order) -> None:
    with pytest.raises(BootFailed):
        await host.create(ID, order.next, boot_timeout_ms=1000, **{**SPEC, "hostname": MUTE})


async def start_in_vain(host: Host, order: Order) -> None:
    (host.data / "machines" / ID / REFUSE).touch()
    with pytest.raises(BootFailed):
        await start(host, order)


async def resize(host: Host, order: Order) -> None:
    body = json.dumps({"memory_mib": 72, "storage_bytes": 80 << 20}).encode()
    await host.ask("POST", f"/machines/{ID}/resize", order.next, body)


async def visit(host: Host, order: Order) -> None:
    await host.ask("POST", f"/machines/{ID}/files/ops", order.now, b'{"operation":"list"}')


async def visit_in_vain(host: Host, order: Order) -> None:
    (host.data / "machines" / ID / REFUSE).touch()
    with pytest.raises(BootFailed):
        await visit(host, order)


async def end_vmm(host: Host, _order: Order) -> None:
    (line,) = (line for line in host.leftovers() if line.startswith("process"))
    host.box.run("kill", "-9", line.split()[1])


async def take(host: Host, order: Order) -> None:
    body = json.dumps({"snapshot_id": order.snapshot}).encode()
    await host.ask("POST", f"/machines/{ID}/snapshots", order.next, body)


async def take_in_vain(host: Host, order: Order) -> None:
    (host.data / "snapshots" / order.snapshot).touch()  # where its folder should be
    with pytest.raises(SnapshotFailed):
        await take(host, order)


async def restore(host: Host, order: Order) -> None:
    body = json.dumps({"snapshot_id": order.snapshot}).encode()
    await host.ask("POST", f"/machines/{ID}/restore", order.next, body)


async def restore_in_vain(host: Host, order: Order) -> None:
    (host.data / "snapshots" / order.snapshot / "disk.raw").unlink()
    with pytest.raises(SnapshotNotFound):
        await restore(host, order)


async def forget(host: Host, order: Order) -> None:
    await host.ask("DELETE", f"/snapshots/{order.snapshot}", headers=order.owner)


async def fetch(host: Host, order: Order) -> None:
    """A new machine with a disk that was carried away: one cluster, and holes. The machine itself fails, since an agent
    that is a process lets nobody log in; that is after all points of the fetch.
    """
    packed = render_head(64 << 20, [Run(0, 1)]) + b"content".ljust(CLUSTER, b"\0")
    (host.folder / "packed").write_bytes(packed)
    async with host.box.serve(host.folder) as url:
        disk = {"id": "disk-system", "size_bytes": len(packed), "download_url": f"{url}/packed"}
        body = {"machine_id": ID, "memory_mib": 64, "snapshot": {"image_id": IMAGE, "artifacts": [disk]}}
        await host.ask("POST", f"/snapshots/{order.snapshot}/restore", body=json.dumps(body).encode())


#: By operation, the kinds of points of which are told by their first word: what comes before, and what reaches them.
BEFORE: dict[str, tuple[Deed, ...]] = {
    "create": (),
    "quarters": (),
    "delete": (create,),
    "stop": (create,),
    "start": (create, stop),
    "resize": (create,),
    "visit": (create, stop),
    "exit": (create,),
    "network": (create,),
    "freeze": (create,),
    "import": (),
    "port": (create,),
    "snapshot": (create, stop),
    "restore": (create, stop, take),
    "unsnapshot": (create, stop, take),
}
DEEDS: dict[str, Deed] = {
    "create": create,
    "quarters": create,
    "delete": delete,
    "stop": stop,
    "start": start,
    "resize": resize,
    "visit": visit,
    "exit": end_vmm,
    "network": change_network,
    "port": publish_and_unpublish,
    "port.undone": publish_in_vain,
    "freeze": take,
    "import": fetch,
    "create.undone": create_in_vain,
    "start.undone": start_in_vain,
    "visit.undone": visit_in_vain,
    "snapshot": take,
    "snapshot.undone": take_in_vain,
    "restore": restore,
    "restore.undone": restore_in_vain,
    "unsnapshot": forget,
}


def test_every_operation_has_its_deed():
    assert {point.partition(".")[0] for point in POINTS} == BEFORE.keys()


# -- the invariant ----------------------------------------------------------------------------------------------------


async def is_settled(host: Host) -> bool:
    state = json.loads(await host.ask("GET", "/state"))
    return not any(entry["operation"] for entry in state["journal"]["entries"])


def admitted(host: Host) -> int:
    """Machines that the host's rules let through."""
    listing = json.loads(host.box.run("nft", "-j", "list", "table", "inet", f"fuse_{host.instance}"))
    sets = {entry["set"]["name"]: entry["set"] for entry in listing["nftables"] if "set" in entry}
    return len(sets["sources"].get("elem", []))


async def check_agreement(host: Host) -> list[MachineBody]:
    """Nothing is open, and the host has what the registry says, of every kind and neither more nor less."""
    await until(lambda: is_settled(host), 180)
    machines = await host.machines()
    running = {machine.id for machine in machines if machine.phase == "running"}
    wanted = {kind: len(running) for kind in ("process", "namespace", "link", "run directory", "cgroup", "nft element")}
    wanted["machine directory"] = len(machines)

    def counted() -> dict[str, int]:
        lines = [line for line in host.leftovers() if not line.startswith("nft element")]
        kinds = {kind: sum(line.startswith(kind) for line in lines) for kind in wanted}
        kinds["nft element"] = admitted(host)
        return kinds

    try:
        await until(lambda: counted() == wanted, 60)
    except TimeoutError:
        raise AssertionError((counted(), wanted, host.leftovers(), host.tail())) from None
    reserved = json.loads(await host.ask("GET", "/state"))["journal"]["reservations"]
    assert sorted({row["machine_id"] for row in reserved}) == sorted(machine.id for machine in machines)
    assert {row["machine_id"] for row in reserved if row["kind"] == "slot"} == running
    await until(lambda: has_snapshots(host), 60)
    await until(lambda: not any(is_held(host, machine_id) for machine_id in running), 60)
    return machines


def is_held(host: Host, machine_id: str) -> bool:
    """May the machine not write to its disk?"""
    return HeldDisk(host.data / "machines" / machine_id / JAIL / HELD).is_held


async def has_snapshots(host: Host) -> bool:
    """Nothing is under way with a snapshot, and there are bytes of those that are known."""
    known = msgspec.json.decode(await host.ask("GET", "/snapshots"), type=SnapshotList).snapshots
    folders = {entry.name for entry in (host.data / "snapshots").iterdir()}
    return folders == {one.id for one in known if one.state == "ready"} and len(folders) == len(known)


@pytest.mark.parametrize("operation", sorted(BEFORE))
async def test_a_daemon_that_dies_at_any_point_of(agent_host: Host, operation: str):
    host = agent_host
    host.options["--artifact-networks"] = "127.0.0.0/8"
    await host.start()
    for number, point in enumerate(sorted(point for point in POINTS if point.partition(".")[0] == operation)):
        await kill_at(host, point, Order(f"u{number}", is_local=operation == "import"))
    assert await host.stop() == 0
    assert not (host.data / UNKNOWN).exists(), (host.data / UNKNOWN).read_text()


async def kill_at(host: Host, point: str, order: Order) -> None:
    """Let the daemon die there, start it again, look, and clear up."""
    for deed in BEFORE[point.partition(".")[0]]:
        await deed(host, order)
    arm(host, point)
    deed = DEEDS.get(point.removesuffix(".writing")) or DEEDS[point.partition(".")[0]]
    with contextlib.suppress(ConnectionError):
        await deed(host, order)
    assert await host.wait_end() == -9, point

    await host.start()
    machines = await check_agreement(host)
    phases = [machine.phase.value for machine in machines]
    assert phases in ([], ["running"], ["stopped"], ["failed"]), point
    if point.partition(".")[0] in ("create", "quarters") and "undone" not in point:
        # Whoever got no answer asks again, and gets the machine: the one that there is, or another.
        machine = await host.create(ID, order.now, **SPEC)
        assert machine.phase == "running"
        assert phases in ([], ["running"])
        assert (await Guest(host, ID, order.now).exec("true", cwd="/")).exit_code == 0
    if DEEDS.get(point.partition(".")[0]) is fetch:
        assert phases == []
        await fetch(host, order)
        content = (host.data / "snapshots" / order.snapshot / "disk.raw").read_bytes()
        assert (len(content), content.rstrip(b"\0")) == (64 << 20, b"content")
    await host.delete(ID, order.next)
    with contextlib.suppress(SnapshotNotFound):
        await forget(host, order)
    assert await check_agreement(host) == []
    assert await host.wait_empty() == []


def arm(host: Host, point: str) -> None:
    new = Path(f"{host.data / FAULT}.new")
    new.write_text(point)
    new.rename(host.data / FAULT)
