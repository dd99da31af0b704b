"""The doctor: every check answers, names a remedy, and the verdict follows from the worst of them."""

from pathlib import Path

import pytest

from fusevm.host.config import HostConfig
from fusevm.host.doctor import CHECKS, Check, Finding, Level, Report, _examine, examine, exit_status, judge


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
    assert [one.name for one in reports] == [check.name for check in CHECKS]
    assert len({check.name for check in CHECKS}) == len(CHECKS)
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
