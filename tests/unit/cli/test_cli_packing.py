"""Files that appear whole or not at all; archives that cannot leave their folder."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusevm.cli.failures import CliError
from fusevm.cli.packing import pack, packed_size, unpack
from fusevm.cli.transfer import atomic_file, open_target, publish_folder


def test_an_interrupted_file_never_has_a_name(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def interrupted() -> None:
        with atomic_file(path, 0o600) as file:
            file.write(b"half")
            file.flush()
            assert list(tmp_path.iterdir()) == []
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_atomic_files_work_where_nameless_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path, flags, *more):  # type: ignore[no-untyped-def]
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    with atomic_file(tmp_path / "x", 0o640) as file:
        file.write(b"all")
    assert (tmp_path / "x").read_bytes() == b"all"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "y", 0o600):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_devices_and_pipes_are_written_to_and_links_followed(tmp_path: Path) -> None:
    null = Path("/dev/null")
    with open_target(null, 0o600) as file:
        file.write(b"x")
    assert null.is_char_device()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real").write_text("old")
    with open_target(tmp_path / "link", 0o600) as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def tar_of(*entries: tuple[tarfile.TarInfo, bytes]) -> Iterator[bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for entry, content in entries:
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    yield buffer.getvalue()


def entry_of(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, linkname
    return entry


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_no_entry_leaves_the_folder_by_its_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(CliError, match="outside"):
        unpack(tar_of((entry_of(name), b"evil")), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_no_entry_leaves_the_folder_through_a_link(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    outside.mkdir()
    evil = tar_of((entry_of("l", tarfile.SYMTYPE, str(outside)), b""), (entry_of("l/x"), b"evil"))
    with pytest.raises((CliError, OSError)):
        unpack(evil, folder)
    assert list(outside.iterdir()) == []
    with pytest.raises(CliError, match="outside"):
        unpack(tar_of((entry_of("h", tarfile.LNKTYPE, "../../etc/passwd"), b"")), folder)


def test_set_id_bits_and_devices_are_not_taken_over(tmp_path: Path) -> None:
    setuid, device = entry_of("s"), entry_of("d", tarfile.CHRTYPE)
    setuid.mode = 0o4755
    assert unpack(tar_of((setuid, b"x"), (device, b"")), tmp_path)[0] == 2
    assert (tmp_path / "s").stat().st_mode & 0o7777 == 0o755
    assert not (tmp_path / "d").exists()


def test_a_cut_archive_is_an_error(tmp_path: Path) -> None:
    whole = b"".join(tar_of((entry_of("x"), bytes(5000))))
    with pytest.raises(CliError, match="no whole tar"):
        unpack(iter([whole[:3000]]), tmp_path)


def test_packing_gives_up_when_nobody_reads(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(10_000_000))
    assert packed_size(tmp_path) > 10_000_000
    with pack(tmp_path, "t") as pieces:
        next(pieces)
    # The writer's thread has ended; a leak would show as a warning.


def test_publishing_never_replaces_a_folder_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/x").write_text("file")
    (tmp_path / "place/x").mkdir(parents=True)
    with pytest.raises(CliError, match="folder"):
        publish_folder(tmp_path / "new", tmp_path / "place")
