"""Sealed values, and where the key comes from."""

import base64
import stat
from pathlib import Path

import pytest

from fusevm.control.secrets import Sealer, load_key
from fusevm.model.errors import BadSetting

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
