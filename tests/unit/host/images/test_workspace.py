"""A folder that several builds share for as long as one of them uses it."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from fusevm.host.images.workspace import brief_lock, passing_folder, workspace
from fusevm.model.errors import BadSetting


async def test_the_folder_is_there_while_it_is_used_and_gone_with_its_last_user(tmp_path: Path):
    path = tmp_path / "shared"
    async with passing_folder(path):
        async with passing_folder(path) as second, workspace(second) as folder:
            assert folder.parent == path
            assert path.stat().st_mode & 0o777 == 0o711
        assert (path / ".lock").exists()
    assert not path.exists()


async def test_the_folder_of_a_killed_build_stays_for_the_next_one_to_clear(tmp_path: Path):
    path = tmp_path / "shared"
    async with passing_folder(path):
        (path / ".build-killed").mkdir()
    assert (path / ".build-killed").exists()
    async with passing_folder(path) as again, workspace(again):
        assert not (path / ".build-killed").exists()
    assert not path.exists()


async def test_what_is_made_for_one_who_has_gone_is_gone_too(tmp_path: Path):
    """A thread that waits for a lock cannot be cancelled, and goes on when it has it."""

    async def use() -> None:
        async with workspace(tmp_path):
            raise AssertionError("it was cancelled before")

    with brief_lock(tmp_path):
        user = asyncio.create_task(use())
        for _ in range(3):
            await asyncio.sleep(0)
            user.cancel()
        await asyncio.sleep(0)
        assert not user.done()
    with pytest.raises(asyncio.CancelledError):
        await user
    assert list(tmp_path.glob(".build-*")) == []


async def test_what_another_process_uses_is_not_removed(tmp_path: Path):
    path = tmp_path / "shared"
    program = f"""
import asyncio, sys
from pathlib import Path
from fusevm.host.images.workspace import passing_folder
async def main():
    async with passing_folder(Path({str(path)!r})):
        print("held", flush=True)
        sys.stdin.read()
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        async with passing_folder(path):
            pass
        assert path.exists()
        other.stdin.close()
        assert other.wait() == 0
    assert not path.exists()


async def test_many_that_come_and_go_never_meet_a_folder_that_is_gone(tmp_path: Path):
    path = tmp_path / "shared"

    async def use() -> None:
        for _ in range(20):
            async with passing_folder(path):
                await asyncio.to_thread(touch, path)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(use())
    assert not path.exists()


def touch(path: Path) -> None:
    with brief_lock(path):
        assert path.is_dir()


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("/")])
async def test_what_is_no_folder_of_ours_is_refused(tmp_path: Path, make):
    make(tmp_path / "shared")
    with pytest.raises(BadSetting, match="remove it"):
        async with passing_folder(tmp_path / "shared"):
            pass
