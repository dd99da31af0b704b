"""The benchmark's arithmetic and its baseline."""

from pathlib import Path

from fusevm.cli.measurement_report import Comparison, Results, percentile, render_json, render_table, verdict
from fusevm.cli.measurements import RAW_SCRIPT


def comparison(unit: str = "ms", budget: float | None = None) -> Comparison:
    return Comparison(what="boot", unit=unit, raw=[90.0, 100.0, 110.0], fuse=[120.0, 130.0, 140.0], budget=budget)


def test_the_baseline_is_a_script_of_some_sixty_lines_that_imports_nothing_of_ours():
    text = Path(RAW_SCRIPT).read_text()
    assert len(text.splitlines()) <= 64
    assert "import fusevm" not in text
    assert "from fusevm" not in text


def test_a_percentile_is_a_sample():
    assert percentile([5.0], 0.95) == 5.0
    assert percentile([float(number) for number in range(100)], 0.95) == 95.0


def test_a_budget_in_time_is_added_to_raw():
    assert verdict(comparison(budget=30)).startswith("ok")
    assert verdict(comparison(budget=29)).startswith("MISSED")
    assert verdict(comparison()) == ""


def test_a_budget_in_throughput_is_a_share_of_raw():
    slow = Comparison(what="up", unit="MiB/s", raw=[100.0], fuse=[79.0], budget=0.8)
    assert verdict(slow).startswith("MISSED")
    assert verdict(Comparison(what="up", unit="MiB/s", raw=[100.0], fuse=[81.0], budget=0.8)).startswith("ok")


def test_the_table_shows_medians_ratio_and_difference_and_json_every_sample():
    results = Results(about={"machine": "mine"}, comparisons=[comparison(budget=50)])
    table = render_table(results)
    assert "machine: mine" in table
    assert "| boot | ms | 3 | 100.0 | 110.0 | 130.0 | 140.0 | 1.30 | +30.0 | ok (raw + 50 ms) |" in table
    assert render_json(results)["comparisons"][0]["raw"] == [90.0, 100.0, 110.0]
