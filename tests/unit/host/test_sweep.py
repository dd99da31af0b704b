"""Sweeps: what nobody owns goes, what somebody owns stays, and nothing goes at the first glance."""

from fusevm.host.sweep import Directories, Leftover, Sweeper
from fusevm.model.errors import Internal


class Things:
    """A kind of thing, as a set of owners."""

    def __init__(self, kind: str, *names: str) -> None:
        self.kind = kind
        self.names = set(names)
        self.is_broken = False

    async def observe(self) -> set[str]:
        return set(self.names)

    async def clear(self, name: str) -> None:
        if self.is_broken:
            raise Internal(problem="it does not go")
        self.names.discard(name)


async def test_a_leftover_must_be_seen_twice():
    things, known = Things("cgroup", "m-1", "m-2"), {"m-1"}
    sweeper = Sweeper([things], lambda: known)
    assert await sweeper.sweep() == frozenset()
    assert things.names == {"m-1", "m-2"}
    assert sweeper.present == {Leftover(kind="cgroup", name="m-2")}
    assert await sweeper.sweep() == {Leftover(kind="cgroup", name="m-2")}
    assert things.names == {"m-1"}
    assert (sweeper.present, sweeper.removed) == (frozenset(), 1)


async def test_at_the_start_one_look_is_enough():
    things = Things("process", "m-1", "m-2")
    await Sweeper([things], lambda: {"m-1"}).sweep(is_start=True)
    assert things.names == {"m-1"}


async def test_a_machine_that_was_made_between_the_looks_is_left_alone():
    things, known = Things("cgroup", "m-1"), set()
    sweeper = Sweeper([things], lambda: known)
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

    things = Slow("cgroup", "m-1", "m-2")
    await Sweeper([things], lambda: known).sweep(is_start=True)
    assert things.names == {"m-2"}


async def test_what_does_not_go_is_tried_again_and_keeps_nothing_else():
    broken, whole = Things("cgroup", "m-1"), Things("run directory", "m-1")
    broken.is_broken = True
    sweeper = Sweeper([broken, whole], set)
    await sweeper.sweep(is_start=True)
    assert (broken.names, whole.names) == ({"m-1"}, set())
    assert sweeper.present == {Leftover(kind="cgroup", name="m-1")}
    broken.is_broken = False
    await sweeper.sweep()
    assert broken.names == set()


async def test_directories(tmp_path):
    (tmp_path / "m-1" / "deep").mkdir(parents=True)
    (tmp_path / "m-1" / "file").write_text("x")
    (tmp_path / "lock").write_text("not a machine")
    ground = Directories("run directory", tmp_path)
    assert await ground.observe() == {"m-1"}
    await ground.clear("m-1")
    await ground.clear("m-1")
    assert await ground.observe() == set()
    assert (tmp_path / "lock").exists()
