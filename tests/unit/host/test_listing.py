"""Directories that somebody else may be removing."""

from pathlib import Path

from fusevm.host.listing import names_in


def test_what_is_no_directory_any_more_holds_nothing(tmp_path: Path):
    (tmp_path / "b").touch()
    (tmp_path / "a").mkdir()
    assert names_in(tmp_path) == ["a", "b"]
    assert names_in(tmp_path / "a") == names_in(tmp_path / "b") == names_in(tmp_path / "gone") == []
