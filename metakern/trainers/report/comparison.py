"""The report of a comparison: the leaderboard, and the error against the majority share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from metakern.trainers.compare import Cell
from metakern.trainers.leaderboard import Entry, leaderboard, shares
from metakern.trainers.report import figures
from metakern.trainers.report.page import page, settings, table


def write_comparison(cells: Sequence[Cell], path: Path) -> Path:
    """Write the report of the finished ones of `cells` to `path` and return it."""
    entries = leaderboard(cells)
    config = cells[0].config
    seeds = sorted({cell.config.seed for cell in cells})
    done = sum(cell.result is not None for cell in cells)
    lead = f"Test error over {len(seeds)} seeds; {done} of {len(cells)} runs are finished."
    by_method: dict[str, dict[float, tuple[float, float]]] = {}
    for entry in entries:
        if entry.majority is not None:
            by_method.setdefault(entry.method, {})[entry.majority] = (entry.mean, entry.deviation)
    sections = [
        ("Test error, %", "<p>Mean and deviation over seeds; the lowest mean is set off.</p>" + _errors(entries)),
        ("", figures.error_by_majority(by_method) if by_method else ""),
        (f"Difference to {config.method}, paired by seed", _differences(entries, config.method)),
        ("", settings([(name, str(value)) for name, value in config.identity().items() if name not in _VARIED])),
    ]
    path.write_text(page(f"{len({entry.method for entry in entries})} methods on {config.data}", lead, sections))
    return path


_VARIED = ("method", "majority", "seed")


def _axes(entries: Sequence[Entry]) -> tuple[list[str], list[float | None], dict[tuple[str, float | None], Entry]]:
    methods = list(dict.fromkeys(entry.method for entry in entries))
    majorities = shares(entries)
    return methods, majorities, {(entry.method, entry.majority): entry for entry in entries}


def _head(majorities: Sequence[float | None]) -> list[str]:
    return ["method"] + ["test error" if share is None else f"{100 * share:g} %" for share in majorities]


def _errors(entries: Sequence[Entry]) -> str:
    methods, majorities, known = _axes(entries)
    rows, best = [[*_head(majorities), "seconds a run"]], []
    for method in methods:
        own = [known.get((method, majority)) for majority in majorities]
        seconds = [entry.seconds for entry in own if entry]
        texts = ["-" if entry is None else _plus_minus(entry.mean, entry.deviation) for entry in own]
        rows.append([method, *texts, f"{sum(seconds) / len(seconds):.0f}"])
    for column, majority in enumerate(majorities, start=1):
        means = {
            row: known[method, majority].mean for row, method in enumerate(methods, 1) if (method, majority) in known
        }
        best.append((min(means, key=means.__getitem__), column))
    return table(rows, best=best)


def _differences(entries: Sequence[Entry], first: str) -> str:
    methods, majorities, known = _axes(entries)
    rows = [_head(majorities)]
    for method in methods:
        if method != first:
            own = [known.get((method, majority)) for majority in majorities]
            rows.append([method, *("-" if e is None else _plus_minus(e.difference, e.interval, sign="+") for e in own)])
    return "<p>Percentage points of test error, with 95 % confidence intervals (Student's t).</p>" + table(rows)


def _plus_minus(value: float, spread: float, sign: str = "") -> str:
    if math.isnan(value):
        return "-"
    return format(value, f"{sign}.2f") + ("" if math.isnan(spread) else f" ± {spread:.2f}")
