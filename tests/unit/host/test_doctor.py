"""The doctor: every check answers, names a remedy, and the verdict follows from the worst of them."""

import asyncio
import importlib.util
import os
from pathlib import Path

import pytest

from fusevm.host.config import HostConfig
from fusevm.host.doctor import CHECKS, Check, Finding, Level, Report, _examine, examine, exit_status, judge
from fusevm.host.fitness.table import FITNESS
from fusevm.host.images.build import build_from_tree
from fusevm.host.images.kernel import KernelStore
from fusevm.host.images.store import ImageConfig, ImageStore

_spec = importlib.util.spec_from_file_location("bzimages", Path(__file__).parent / "images" / "test_bzimage.py")
bzimages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bzimages)


def report(level: Level) -> Report:
    return Report(name="n", purpose="p", level=level, found="f", remedy="r")


@pytest.mark.parametrize(
    ("levels", "verdict", "status"),
    [
        ([], "fit", 0),
        ([Level.OK], "fit", 0),
        ([Level.OK, Level.DEGRADED], "degraded", 1),
        ([Level.DEGRADED, Level.UNFIT, Level.OK], "unfit", 2),
    ],
)
def test_the_verdict_is_that_of_the_worst_finding(levels: list[Level], verdict: str, status: int):
    reports = [report(level) for level in levels]
    assert (judge(reports), exit_status(reports)) == (verdict, status)


async def test_every_check_answers_on_this_machine_and_knows_a_remedy(tmp_path: Path):
    reports = await examine(HostConfig(data_root=tmp_path / "data", run_dir=tmp_path / "run"))
    names = [check.name for check in CHECKS] + [check.name for check in FITNESS]
    assert [one.name for one in reports] == names
    assert len(set(names)) == len(names)
    assert [one.number for one in reports if one.number] == list(range(1, 37))
    for one in reports:
        assert one.found
        assert bool(one.remedy) == (one.level is not Level.OK), one
    assert not (tmp_path / "data").exists()


async def test_a_check_that_fails_to_look_is_degraded():
    async def broken(_config: HostConfig) -> Finding:
        raise OSError("no /proc")

    found = await _examine(Check(name="x", purpose="y", observe=broken), HostConfig(data_root=Path("/d")))
    assert (found.level, "no /proc" in found.found) == (Level.DEGRADED, True)


async def test_a_path_that_is_too_long_is_unfit(tmp_path: Path):
    config = HostConfig(data_root=tmp_path, run_dir=Path("/" + "x" * 60))
    reports = {one.name: one for one in await examine(config)}
    assert reports["run_dir"].level is Level.UNFIT


async def look(config: HostConfig, name: str) -> Report:
    return await _examine(next(check for check in CHECKS if check.name == name), config)


async def test_damaged_images_and_kernels_are_told_with_what_repairs_them(tmp_path: Path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "kernel.elf").write_bytes(bzimages.make_elf())
    config = HostConfig(data_root=tmp_path / "data")
    kernel = await KernelStore(config.artefacts).ensure(tmp_path / "kernel.elf")
    image = await build_from_tree(ImageStore(config.artefacts), "small", tmp_path / "tree", config=ImageConfig())
    assert [(await look(config, name)).level for name in ("kernel", "image")] == [Level.OK, Level.OK]
    for path in (kernel.vmlinux, image.rootfs):
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
    found = await look(config, "kernel")
    assert (found.level, found.remedy.startswith(f"rm -r {kernel.directory}")) == (Level.UNFIT, True)
    found = await look(config, "image")
    assert (found.level, found.remedy) == (Level.DEGRADED, "fuse image build --force small")
    assert str(image.rootfs) in found.found


async def test_a_check_that_takes_too_long_is_degraded():
    async def slow(_config: HostConfig) -> Finding:
        await asyncio.Event().wait()
        raise AssertionError

    check = Check(name="x", purpose="y", observe=slow, timeout_s=0.01)
    found = await _examine(check, HostConfig(data_root=Path("/d")))
    assert (found.level, found.found) == (Level.DEGRADED, "could not be looked at within 0 s")
