"""What people look at when they do not trust the rest."""

from collections.abc import Callable
from pathlib import Path

import pytest
from control_harness import Running, running

from fusevm.control.store.sql_store import SqlStore
from fusevm.control.store.statements import Statement

URL = "/v1/debug/invariants"


async def _damage(server: Running, *statements: str) -> None:
    assert isinstance(server.plane.store, SqlStore)
    for statement in statements:
        await server.plane.store._engine.apply(Statement("", (), statement))


async def test_a_sound_store_has_no_violations() -> None:
    async with running() as server:
        assert (await server.http.get(URL)).json() == {"violations": [], "environments": 0, "hosts": 1}
        await server.create("t1")
        await server.create("t2")
        await server.delete("t2")
        assert (await server.http.get(URL)).json() == {"violations": [], "environments": 2, "hosts": 1}


@pytest.mark.parametrize(
    "database", [lambda _: ":memory:", lambda folder: str(folder / "fuse.db")], ids=["ram", "file"]
)
async def test_planted_damage_is_told(tmp_path: Path, database: Callable[[Path], str]) -> None:
    async with running(checked=False, database=database(tmp_path)) as server:
        uid = (await server.create())["uid"]
        await _damage(server, "delete from placements", "delete from events where seq = 2")
        found = (await server.http.get(URL)).json()["violations"]
        assert any(f"{uid}: lives on h1 but is placed as None" in sentence for sentence in found)
        assert any(f"{uid}: facts [1] have a gap" in sentence for sentence in found)
        assert any("host h1: allocated is" in sentence for sentence in found)


async def test_only_the_master_token_may_ask() -> None:
    async with running(auth_token="secret") as server:
        assert (await server.http.get(URL)).status_code == 401
        allowed = await server.http.get(URL, headers={"authorization": "Bearer secret"})
        assert allowed.json()["violations"] == []
