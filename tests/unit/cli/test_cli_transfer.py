"""`fuse cp` against the fake API: targets, checks, and nothing half-done."""

import io
import json
import os
from pathlib import Path

import pytest
from cli_outcome import Fuse
from fake_api import FakeApi, to_json
from starlette.responses import Response


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def environment(api: FakeApi) -> None:
    api.add("a")


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".fuse*")]


def test_a_file_goes_in_and_out_with_its_mode(fuse: Fuse, api: FakeApi, here: Path) -> None:
    data = os.urandom(3_000_000)
    (here / "x").write_bytes(data)
    (here / "x").chmod(0o750)
    done = fuse("cp", "x", "a:/dir/y")
    assert done.code == 0, done.err
    assert (api.disk / "dir/y").read_bytes() == data
    assert (api.disk / "dir/y").stat().st_mode & 0o777 == 0o750
    assert fuse("cp", "a:/dir/y", "z").code == 0
    assert (here / "z").read_bytes() == data
    assert (here / "z").stat().st_mode & 0o777 == 0o750
    assert leftovers(here) == []


def test_a_folder_as_target_takes_the_name_of_the_source(fuse: Fuse, api: FakeApi, here: Path) -> None:
    (here / "x").write_text("1")
    (api.disk / "there").mkdir()
    assert fuse("cp", "x", "a:/there").code == 0
    assert fuse("cp", "x", "a:/new/").code == 0
    assert (api.disk / "there/x").read_text() == (api.disk / "new/x").read_text() == "1"
    (here / "sub").mkdir()
    assert fuse("cp", "a:/there/x", "sub").code == 0
    assert fuse("cp", "a:/there/x", "./sub/").code == 0
    assert (here / "sub/x").read_text() == "1"
    refused = fuse("cp", "a:/there/x", "missing/")
    assert refused.code == 3
    assert "mkdir -p missing/" in refused.err


def test_an_existing_file_is_replaced(fuse: Fuse, api: FakeApi, here: Path) -> None:
    (api.disk / "x").write_text("new")
    (here / "x").write_text("old and longer")
    assert fuse("cp", "a:/x", "x").code == 0
    assert (here / "x").read_text() == "new"


def test_folders_go_in_and_out(fuse: Fuse, api: FakeApi, here: Path) -> None:
    tree = here / "tree"
    (tree / "deep/er").mkdir(parents=True)
    (tree / "deep/er/file").write_text("text")
    (tree / "run.sh").write_text("#!/bin/sh\n")
    (tree / "run.sh").chmod(0o755)
    (tree / "link").symlink_to("deep/er/file")
    assert fuse("cp", "tree", "a:/opt/copy").code == 0, "a new name"
    assert (api.disk / "opt/copy/deep/er/file").read_text() == "text"
    assert (api.disk / "opt/copy/link").readlink() == Path("deep/er/file")
    assert fuse("cp", "tree", "a:/opt").code == 0, "into a folder"
    assert (api.disk / "opt/tree/run.sh").stat().st_mode & 0o777 == 0o755
    assert fuse("cp", "tree/.", "a:/flat").code == 0, "contents only"
    assert (api.disk / "flat/run.sh").exists()

    assert fuse("cp", "a:/opt/copy", "back").code == 0
    assert (here / "back/deep/er/file").read_text() == "text"
    assert (here / "back/link").is_symlink()
    assert (here / "back/run.sh").stat().st_mode & 0o777 == 0o755
    (here / "into").mkdir()
    assert fuse("cp", "a:/opt/copy", "into").code == 0
    assert (here / "into/copy/run.sh").exists()
    (here / "into/copy/mine").write_text("stays")
    assert fuse("cp", "a:/opt/copy", "into").code == 0, "merged"
    assert (here / "into/copy/mine").read_text() == "stays"
    assert leftovers(here) == []


def test_stdin_and_stdout(fuse: Fuse, api: FakeApi, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\x00\xffdata")))
    assert fuse("cp", "-", "a:/x").code == 0
    assert (api.disk / "x").read_bytes() == b"\x00\xffdata"
    (api.disk / "y").write_text("plain")
    done = fuse("cp", "-q", "a:/y", "-")
    assert (done.code, done.out, done.err) == (0, "plain", "")


def test_json_names_the_digest(fuse: Fuse, here: Path) -> None:
    (here / "x").write_text("")
    done = json.loads(fuse("cp", "-o", "json", "x", "a:/x").out)
    assert done["sha256"].startswith("e3b0c44298fc")
    assert done["path"] == "fuse-a:/x"


@pytest.mark.parametrize("line", [["x", "y"], ["a:/x", "a:/y"], ["x", "a:y"]])
def test_wrong_sides_are_wrong_usage(fuse: Fuse, here: Path, line: list[str]) -> None:
    (here / "x").write_text("")
    assert fuse("cp", *line).code == 2


def test_a_colon_here_is_written_with_a_dot(fuse: Fuse, api: FakeApi, here: Path) -> None:
    (here / "b:c").write_text("1")
    assert fuse("cp", "./b:c", "a:/x").code == 0
    assert (api.disk / "x").read_text() == "1"


def test_what_is_missing_is_not_found(fuse: Fuse, here: Path) -> None:
    assert fuse("cp", "nothing", "a:/x").code == 3
    assert fuse("cp", "a:/nothing", "x").code == 3
    assert not (here / "x").exists()


def test_a_wrong_digest_is_an_error(fuse: Fuse, api: FakeApi, here: Path) -> None:
    (here / "x").write_text("1")
    api.script("PUT", "/v1/environments/fuse-a/files", lambda: to_json({"path": "/x", "size_bytes": 1, "sha256": "0"}))
    done = fuse("cp", "x", "a:/x")
    assert done.code == 5
    assert "damaged" in done.err


def test_a_damaged_download_leaves_what_was_there(fuse: Fuse, api: FakeApi, here: Path) -> None:
    (here / "x").write_text("before")
    damaged = lambda: Response(b"after", headers={"x-fuse-sha256": "0" * 64})  # noqa: E731
    api.script("GET", "/v1/environments/fuse-a/files", damaged)
    assert fuse("cp", "a:/x", "x").code == 5
    assert (here / "x").read_text() == "before"
    assert leftovers(here) == []


def test_a_cut_download_leaves_what_was_there(fuse: Fuse, api: FakeApi, here: Path) -> None:
    (here / "x").write_text("before")
    cut = lambda: Response(b"half", headers={"content-length": "4000"})  # noqa: E731
    api.script("GET", "/v1/environments/fuse-a/files", cut)
    assert fuse("cp", "a:/x", "x").code == 5
    assert (here / "x").read_text() == "before"
    assert leftovers(here) == []
