"""Sealed values, and where the key comes from."""

import base64
import stat
from pathlib import Path

import pytest
from msgspec.structs import replace

from fusevm.control.clock import SystemClock
from fusevm.control.config import ControlConfig
from fusevm.control.secrets import BATCH, Sealer, load_key, load_secret, open_sealer, reseal_all, row_of
from fusevm.control.store.sqlite import open_sqlite
from fusevm.core.policy import Policy
from fusevm.model.errors import BadSetting, NoEncryptionKey

KEY = bytes(range(32))


def test_what_was_sealed_opens_for_its_row_only() -> None:
    sealer = Sealer(KEY)
    sealed = sealer.seal("token", row="host:a/token")
    assert "token" not in sealed
    assert sealer.open(sealed, row="host:a/token") == "token"
    with pytest.raises(BadSetting, match="damaged"):
        sealer.open(sealed, row="host:b/token")


def test_no_two_seals_are_alike() -> None:
    assert Sealer(KEY).seal("x", row="r") != Sealer(KEY).seal("x", row="r")


def test_another_key_is_told_apart_from_damage() -> None:
    sealed = Sealer(KEY).seal("token", row="r")
    with pytest.raises(BadSetting, match="another key"):
        Sealer(bytes(32)).open(sealed, row="r")
    blob = bytearray(base64.b64decode(sealed))
    blob[-1] ^= 1
    for damaged in (base64.b64encode(blob).decode(), "!"):
        with pytest.raises(BadSetting, match="damaged"):
            Sealer(KEY).open(damaged, row="r")


def test_a_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    database = str(tmp_path / "fuse.db")
    key = load_key("", database)
    assert len(key) == 32
    assert load_key("", database) == key
    assert stat.S_IMODE((tmp_path / "fuse.db.key").stat().st_mode) == 0o600


def test_a_set_key_wins(tmp_path: Path) -> None:
    assert load_key("ab" * 32, str(tmp_path / "fuse.db")) == b"\xab" * 32
    assert not (tmp_path / "fuse.db.key").exists()


def test_in_memory_every_key_is_new() -> None:
    assert load_key("", ":memory:") != load_key("", ":memory:")


def test_a_damaged_key_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "fuse.db.key").write_text("oops")
    with pytest.raises(BadSetting, match="64 hex"):
        load_key("", str(tmp_path / "fuse.db"))


def test_a_key_that_cannot_be_written_is_a_setting(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="key file"):
        load_key("", str(tmp_path / "missing" / "fuse.db"))


# -- rotation ------------------------------------------------------------------------------------------------------

NEW = bytes(reversed(range(32)))


class Rows:
    """The secrets of a store."""

    def __init__(self, sealed: str | None) -> None:
        self.sealed = sealed

    async def get_secret(self, owner: str, name: str) -> str | None:
        assert (owner, name) == ("host:a", "token")
        return self.sealed

    async def reseal_secret(self, owner: str, name: str, old: str, new: str) -> None:
        assert (owner, name, old) == ("host:a", "token", self.sealed)
        self.sealed = new


async def test_a_previous_key_opens_and_what_is_used_is_sealed_with_the_present_one() -> None:
    rows = Rows(Sealer(KEY).seal("secret", row=row_of("host:a", "token")))
    rotated = Sealer(NEW, [KEY])
    assert await load_secret(rows, rotated, "host:a", "token") == "secret"
    assert rows.sealed is not None
    assert rotated.is_current(rows.sealed)
    assert await load_secret(rows, Sealer(NEW), "host:a", "token") == "secret"
    with pytest.raises(BadSetting, match="another key"):
        await load_secret(rows, Sealer(KEY), "host:a", "token")


async def test_what_is_sealed_with_the_present_key_is_left_alone() -> None:
    sealed = Sealer(KEY).seal("secret", row=row_of("host:a", "token"))
    rows = Rows(sealed)
    assert await load_secret(rows, Sealer(KEY, [NEW]), "host:a", "token") == "secret"
    assert rows.sealed == sealed
    assert await load_secret(Rows(None), Sealer(KEY), "host:a", "token") is None


async def test_everything_is_sealed_with_the_present_key_without_being_used() -> None:
    store = await open_sqlite(":memory:", Policy(), SystemClock().now_ms)
    old, rotated, new = Sealer(KEY), Sealer(NEW, [KEY]), Sealer(NEW)
    owners = [f"env:{number:03}" for number in range(BATCH + 5)]
    try:
        for owner in owners:
            await store.put_secret(owner, "setup", old.seal(owner, row=row_of(owner, "setup")))
        await store.put_secret("env:000", "damaged", Sealer(bytes(32)).seal("x", row="env:000/damaged"))
        assert await reseal_all(store, Sealer(None)) == 0
        assert await reseal_all(store, rotated) == len(owners)
        assert await reseal_all(store, rotated) == 0
        for owner in owners:
            assert await load_secret(store, new, owner, "setup") == owner
    finally:
        await store.close()


def test_without_a_key_nothing_is_sealed() -> None:
    sealer = Sealer(None)
    assert not sealer.has_key
    with pytest.raises(NoEncryptionKey, match="TOKEN_ENCRYPTION_KEY"):
        sealer.seal("x", row="r")
    with pytest.raises(BadSetting, match="another key"):
        sealer.open(Sealer(KEY).seal("x", row="r"), row="r")


def test_the_sealer_of_a_configuration(tmp_path: Path) -> None:
    postgres = ControlConfig(database="postgresql://h/db")
    assert not open_sealer(postgres).has_key
    old = open_sealer(replace(postgres, encryption_key=KEY.hex())).seal("x", row="r")
    rotated = replace(postgres, encryption_key=NEW.hex(), previous_keys=(KEY.hex(),))
    assert open_sealer(rotated).open(old, row="r") == "x"
    assert open_sealer(ControlConfig(database=str(tmp_path / "fuse.db"))).has_key
    assert open_sealer(ControlConfig()).has_key
