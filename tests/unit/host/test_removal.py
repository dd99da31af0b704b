"""Removing what others have made."""

import os
from pathlib import Path

import pytest

from fusevm.host.removal import remove_tree


def make_deep(folder: Path, depth: int) -> None:
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    for number in range(depth):
        with open(os.open(f"file-{number}", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor), "w") as file:  # noqa: PTH123
            file.write("content")
        os.symlink("/etc", "link", dir_fd=descriptor)
        os.mkdir("d", dir_fd=descriptor)
        deeper = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = deeper
    os.close(descriptor)


@pytest.mark.parametrize("depth", [0, 3, 3000])
def test_a_tree_of_any_depth_is_removed_and_what_its_links_name_is_not(tmp_path: Path, depth: int):
    make_deep(tmp_path / "tree", depth)
    remove_tree(tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []
    assert Path("/etc").is_dir()


def test_a_file_and_nothing_are_removed_too(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    for _ in range(2):
        remove_tree(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
