"""What was measured, as a table for people and as JSON with every sample."""

import statistics
from collections.abc import Sequence
from typing import Any

import msgspec


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One thing done both ways. Samples in `unit`."""

    what: str
    #: `ms` (less is better) or `MiB/s` (more is better).
    unit: str
    raw: list[float]
    fuse: list[float]
    #: What may be added to (ms) or must remain of (MiB/s, as a share) the raw figure; None: no budget.
    budget: float | None = None


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one run."""

    #: Machine, versions, driver: for the reader of a table.
    about: dict[str, str]
    comparisons: list[Comparison]


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` of all lie (nearest rank)."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def verdict(item: Comparison) -> str:
    """Does the median keep the budget?"""
    if item.budget is None:
        return ""
    raw, fuse = statistics.median(item.raw), statistics.median(item.fuse)
    if item.unit == "ms":
        return f"{'ok' if fuse <= raw + item.budget else 'MISSED'} (raw + {item.budget:g} ms)"
    return f"{'ok' if fuse >= raw * item.budget else 'MISSED'} ({item.budget:.0%} of raw)"


def render_json(results: Results) -> dict[str, Any]:
    """Everything, raw samples included."""
    converted: dict[str, Any] = msgspec.to_builtins(results)
    return converted


def render_table(results: Results) -> str:
    """A Markdown table, which is also readable in a terminal."""
    lines = [f"{name}: {value}" for name, value in results.about.items()]
    lines += ["", "| what | unit | n | raw p50 | raw p95 | fuse p50 | fuse p95 | ratio | difference | budget |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for item in results.comparisons:
        raw, fuse = statistics.median(item.raw), statistics.median(item.fuse)
        figures = [raw, percentile(item.raw, 0.95), fuse, percentile(item.fuse, 0.95)]
        cells = [item.what, item.unit, str(len(item.fuse)), *(f"{figure:.1f}" for figure in figures)]
        cells += [f"{fuse / raw:.2f}", f"{fuse - raw:+.1f}", verdict(item)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
