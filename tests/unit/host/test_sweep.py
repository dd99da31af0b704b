"""Sweeps: what nobody owns goes, what somebody owns stays, nothing at the first glance; what is missing is told."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterable

import msgspec
import pytest

from fusevm.host import sweep
from fusevm.host.drift import Claim, Kind, Thing, claim_of, compare, missing_snapshots
from fusevm.host.grounds import Contents, Directories, Processes, Snapshots
from fusevm.host.metrics import Metrics
from fusevm.host.process import identify
from fusevm.host.snapshots.record import HostSnapshot, SnapshotPhase
from fusevm.host.sweep import Sweeper
from fusevm.host.vmm.firecracker.driver import FirecrackerDriver
from fusevm.model.errors import Internal
from fusevm.model.machine import Fence, Machine, MachineSpec, Phase

ANY = Claim()
MACHINE = Machine(
    id="m-1",
    fence=Fence(cluster="c", uid="u", incarnation=1, action_seq=1),
    spec=MachineSpec(image="debian-12"),
    phase=Phase.RUNNING,
    slot=3,
    created_at_ms=0,
    started_at_ms=1,
    updated_at_ms=0,
)

SNAPSHOT = HostSnapshot(
    id="s-1",
    cluster="c",
    machine_id="m-1",
    phase=SnapshotPhase.READY,
    image_digest="",
    disk_bytes=1 << 20,
    created_at_ms=0,
)


class Things:
    """A kind of thing, as a set of owners."""

    def __init__(self, kind: Kind, *names: str) -> None:
        self.kind = kind
        self.names = set(names)
        self.is_broken = False
        self.is_blind = False

    async def observe(self) -> set[str]:
        if self.is_blind:
            raise OSError("it cannot be looked at")
        return set(self.names)

    async def clear(self, name: str) -> None:
        if self.is_broken:
            raise Internal(problem="it does not go")
        self.names.discard(name)


class Seen:
    """A witness that says what it is told to say."""

    def __init__(self, **kinds: set[str]) -> None:
        self.kinds = {Kind[name.upper()]: names for name, names in kinds.items()}

    async def observe(self) -> dict[Kind, set[str]]:
        return self.kinds


def claimed(names: Iterable[str], claim: Claim = ANY) -> Callable[[], dict[str, Claim]]:
    """These machines are known, as of whenever it is asked."""
    return lambda: dict.fromkeys(names, claim)


def thing(kind: Kind, name: str) -> Thing:
    return Thing(kind=kind, name=name)


# -- what nobody owns -----------------------------------------------------------------------------------------------


async def test_a_leftover_must_be_seen_twice():
    things, known = Things(Kind.CGROUP, "m-1", "m-2"), {"m-1"}
    sweeper = Sweeper([things], claimed(known))
    assert await sweeper.sweep() == frozenset()
    assert things.names == {"m-1", "m-2"}
    assert sweeper.drift.leftovers == {thing(Kind.CGROUP, "m-2")}
    assert await sweeper.sweep() == {thing(Kind.CGROUP, "m-2")}
    assert things.names == {"m-1"}
    assert (sweeper.drift.leftovers, sweeper.removed) == (frozenset(), 1)


async def test_at_the_start_one_look_is_enough():
    things = Things(Kind.PROCESS, "m-1", "m-2")
    await Sweeper([things], claimed({"m-1"})).sweep(is_start=True)
    assert things.names == {"m-1"}


async def test_a_machine_that_was_made_between_the_looks_is_left_alone():
    things, known = Things(Kind.CGROUP, "m-1"), set()
    sweeper = Sweeper([things], claimed(known))
    await sweeper.sweep()
    known.add("m-1")
    assert await sweeper.sweep() == frozenset()
    assert things.names == {"m-1"}


async def test_one_that_comes_back_to_life_while_others_are_removed_is_left_alone():
    known: set[str] = set()

    class Slow(Things):
        async def clear(self, name: str) -> None:
            known.add("m-2")
            await super().clear(name)

    things = Slow(Kind.CGROUP, "m-1", "m-2")
    await Sweeper([things], claimed(known)).sweep(is_start=True)
    assert things.names == {"m-2"}


async def test_what_does_not_go_is_tried_again_and_keeps_nothing_else():
    broken, whole = Things(Kind.CGROUP, "m-1"), Things(Kind.RUN_DIRECTORY, "m-1")
    broken.is_broken = True
    sweeper = Sweeper([broken, whole], dict)
    await sweeper.sweep(is_start=True)
    assert (broken.names, whole.names) == ({"m-1"}, set())
    assert sweeper.drift.leftovers == {thing(Kind.CGROUP, "m-1")}
    broken.is_broken = False
    await sweeper.sweep()
    assert broken.names == set()


async def test_a_kind_that_cannot_be_looked_at_is_no_proof_of_anything():
    blind, whole = Things(Kind.CGROUP), Things(Kind.RUN_DIRECTORY, "m-2")
    blind.is_blind = True
    claim = Claim(must=frozenset({Kind.CGROUP}))
    sweeper = Sweeper([blind, whole], claimed({"m-1"}, claim))
    for _look in range(2):
        await sweeper.sweep()
    assert (whole.names, sweeper.drift.missing) == (set(), frozenset())


# -- what a machine at rest should not have ---------------------------------------------------------------------------


async def test_what_a_machine_at_rest_should_not_have_goes_by_its_own_task():
    things, tidied = Things(Kind.PROCESS, "m-1", "m-2"), []

    async def tidy(name: str) -> None:
        tidied.append(name)
        things.names.discard(name)

    rests = Claim(may=frozenset({Kind.DISK}))
    sweeper = Sweeper([things], lambda: {"m-1": rests, "m-2": ANY}, tidy=tidy)
    await sweeper.sweep(is_start=True)
    assert (tidied, sweeper.drift.surplus) == ([], {thing(Kind.PROCESS, "m-1")})
    assert await sweeper.sweep() == {thing(Kind.PROCESS, "m-1")}
    assert (tidied, things.names, sweeper.drift.surplus) == (["m-1"], {"m-2"}, frozenset())


async def test_a_task_that_cannot_tidy_is_asked_again():
    things, errors = Things(Kind.PROCESS, "m-1"), [Internal(problem="not now")]

    async def tidy(name: str) -> None:
        if errors:
            raise errors.pop()
        things.names.discard(name)

    sweeper = Sweeper([things], claimed({"m-1"}, Claim(may=frozenset())), tidy=tidy)
    for _look in range(2):
        await sweeper.sweep()
    assert sweeper.drift.surplus == {thing(Kind.PROCESS, "m-1")}
    await sweeper.sweep()
    assert things.names == set()


# -- what is missing --------------------------------------------------------------------------------------------------


async def test_what_is_missing_is_told_when_it_was_missed_twice_and_until_it_is_back():
    seen = Seen(disk={"m-1"}, tap=set())
    claim = Claim(must=frozenset({Kind.DISK, Kind.TAP, Kind.CGROUP}))
    sweeper = Sweeper([], claimed({"m-1"}, claim), witnesses=[seen])
    await sweeper.sweep()
    assert sweeper.drift.missing == frozenset()
    await sweeper.sweep()
    # Nobody has looked for control groups.
    assert sweeper.drift.missing == {thing(Kind.TAP, "m-1")}
    seen.kinds[Kind.TAP] = {"m-1"}
    await sweeper.sweep()
    assert sweeper.drift.missing == frozenset()


def test_a_machine_claims_what_its_phase_needs():
    running = claim_of(MACHINE, is_quiet=True)
    assert running.must >= {Kind.PROCESS, Kind.SOCKET, Kind.CGROUP, Kind.DISK, Kind.TAP, Kind.RULES, Kind.NAMESPACE}
    assert Kind.TAP not in claim_of(msgspec.structs.replace(MACHINE, slot=-1), is_quiet=True).must
    for phase in (Phase.STOPPED, Phase.FAILED):
        rests = claim_of(msgspec.structs.replace(MACHINE, phase=phase, slot=-1), is_quiet=True)
        assert rests.must == rests.may == {Kind.DISK, Kind.MACHINE_DIRECTORY}
        # Its slot is still being given back.
        assert claim_of(msgspec.structs.replace(MACHINE, phase=phase), is_quiet=True) == ANY
        # One that has never run may be without a disk: it gets one when it is started.
        never = claim_of(msgspec.structs.replace(MACHINE, phase=phase, slot=-1, started_at_ms=None), is_quiet=True)
        assert (never.must, never.may) == (frozenset(), rests.may)
    for phase in Phase:
        assert claim_of(msgspec.structs.replace(MACHINE, phase=phase), is_quiet=False) == ANY


def test_only_what_runs_in_a_jail_must_have_one():
    assert Kind.JAIL not in claim_of(MACHINE, is_quiet=True).must
    jailed = msgspec.structs.replace(MACHINE, driver=FirecrackerDriver.name)
    assert Kind.JAIL in claim_of(jailed, is_quiet=True).must
    for phase in (Phase.STOPPED, Phase.FAILED):
        rests = claim_of(msgspec.structs.replace(jailed, phase=phase, slot=-1), is_quiet=True)
        assert Kind.JAIL not in rests.must | rests.may


def test_a_snapshot_that_can_be_used_must_have_its_bytes():
    known = [msgspec.structs.replace(SNAPSHOT, id=phase.value, phase=phase) for phase in SnapshotPhase]
    lost = {thing(Kind.SNAPSHOT, "ready")}
    assert missing_snapshots(known, {}) == lost
    assert missing_snapshots(known, {"ready": SNAPSHOT.disk_bytes - 1}) == lost
    assert missing_snapshots(known, {"ready": SNAPSHOT.disk_bytes, "nobodys": 7}) == frozenset()


async def test_a_snapshot_that_was_missed_twice_is_told_until_it_is_back():
    there: dict[str, int] = {}

    async def sizes() -> dict[str, int]:
        if "broken" in there:
            raise OSError("it cannot be looked at")
        return there

    async def known() -> list[HostSnapshot]:
        return [SNAPSHOT]

    # A machine of the same name is not concerned.
    sweeper = Sweeper([Things(Kind.CGROUP, "s-1")], claimed({"s-1"}), snapshots=Snapshots(sizes, known))
    await sweeper.sweep()
    assert sweeper.drift.missing == frozenset()
    await sweeper.sweep()
    assert sweeper.drift.missing == {thing(Kind.SNAPSHOT, "s-1")}
    there["broken"] = 0
    await sweeper.sweep()
    assert sweeper.drift.missing == frozenset()
    del there["broken"]
    there["s-1"] = SNAPSHOT.disk_bytes
    for _look in range(2):
        await sweeper.sweep()
    assert sweeper.drift.missing == frozenset()


def test_the_comparison_tells_nobodys_things_from_a_machines():
    observed = [thing(Kind.PROCESS, "m-1"), thing(Kind.DISK, "m-1"), thing(Kind.DISK, "m-9")]
    claims = {"m-1": Claim(must=frozenset({Kind.DISK, Kind.TAP}), may=frozenset({Kind.DISK}))}
    drift = compare(observed, claims, {Kind.DISK, Kind.PROCESS, Kind.TAP})
    assert drift.leftovers == {thing(Kind.DISK, "m-9")}
    assert drift.surplus == {thing(Kind.PROCESS, "m-1")}
    assert drift.missing == {thing(Kind.TAP, "m-1")}


async def test_drift_is_a_metric_by_kind():
    metrics, seen = Metrics(), Seen(tap=set())
    things = Things(Kind.CGROUP, "m-2")
    things.is_broken = True
    sweeper = Sweeper([things], claimed({"m-1"}, Claim(must=frozenset({Kind.TAP}))), witnesses=[seen])
    for _look in range(2):
        metrics.note_sweep(sweeper.drift, await sweeper.sweep(), 0.1)
    metrics.note_sweep(sweeper.drift, [thing(Kind.SLOT, "4")], 0.1)
    text = metrics.render().decode()
    assert 'fuse_host_drift{kind="tap",state="missing"} 1.0' in text
    assert 'fuse_host_drift{kind="cgroup",state="leftover"} 1.0' in text
    assert 'fuse_host_drift{kind="process",state="leftover"} 0.0' in text
    assert 'fuse_host_leftovers_removed_total{kind="slot"} 1.0' in text


# -- looking ----------------------------------------------------------------------------------------------------------


async def test_directories(tmp_path):
    (tmp_path / "m-1" / "deep").mkdir(parents=True)
    (tmp_path / "m-1" / "file").write_text("x")
    (tmp_path / "lock").write_text("not a machine")
    (tmp_path / "elsewhere").symlink_to("/etc")
    ground = Directories(Kind.RUN_DIRECTORY, tmp_path)
    assert await ground.observe() == {"m-1"}
    await ground.clear("m-1")
    await ground.clear("m-1")
    assert await ground.observe() == set()
    assert (tmp_path / "lock").exists()


async def test_disks_jails_and_sockets_are_seen(tmp_path):
    machines, run_dir = tmp_path / "machines", tmp_path / "run"
    (machines / "m-1").mkdir(parents=True)
    (machines / "m-1/overlay.raw").write_bytes(b"x")
    (machines / "m-2/jail/root/run").mkdir(parents=True)
    (machines / "m-2/jail/loop").symlink_to(machines)
    (run_dir / "m-1").mkdir(parents=True)
    (run_dir / "m-1/vmm.out").write_text("no socket")
    with socket.socket(socket.AF_UNIX) as inside:
        inside.bind(str(machines / "m-2/jail/root/run/v.sock"))
        witness = Contents(machines, run_dir)
        assert await witness.observe() == {Kind.DISK: {"m-1"}, Kind.JAIL: {"m-2"}, Kind.SOCKET: {"m-2"}}
    assert await Contents(tmp_path / "none", run_dir).observe() == {
        Kind.DISK: set(),
        Kind.JAIL: set(),
        Kind.SOCKET: set(),
    }


async def test_a_recorded_process_counts_only_if_it_is_exactly_that_one(tmp_path):
    mine = identify(os.getpid())
    assert mine is not None
    reused = msgspec.structs.replace(mine, start_ticks=mine.start_ticks - 1)
    for vmm, wanted in ((mine, {"m-1"}), (reused, set()), (None, set())):
        record = msgspec.structs.replace(MACHINE, vmm=vmm)
        assert await Processes(tmp_path, lambda record=record: [record]).observe() == wanted


async def test_a_machine_that_does_not_get_round_to_it_keeps_no_sweep_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweep, "_TIDY_TIMEOUT_S", 0.01)
    things, tidied = Things(Kind.PROCESS, "m-1", "m-2"), []

    async def tidy(machine_id: str) -> None:
        if machine_id == "m-1":
            await asyncio.Event().wait()
        tidied.append(machine_id)

    sweeper = Sweeper([things], claimed(["m-1", "m-2"], Claim(may=frozenset())), tidy=tidy)
    await sweeper.sweep()
    async with asyncio.timeout(30):
        assert await sweeper.sweep() == {thing(Kind.PROCESS, "m-2")}
    assert (tidied, sweeper.drift.surplus) == (["m-2"], {thing(Kind.PROCESS, "m-1")})
