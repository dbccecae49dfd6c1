"""The report of a comparison: the leaderboard, and the error against the majority share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from metakern.trainers.compare import Cell
from metakern.trainers.leaderboard import Entry, count_text, leaderboard, mean_text, most_seeds, plus_minus, shares
from metakern.trainers.report import figures
from metakern.trainers.report.page import page, sentence, settings, table
from metakern.trainers.run_folder import meta_note, read_json


def write_comparison(cells: Sequence[Cell], path: Path) -> Path:
    """Write the report of the finished cells to `path`, and return it."""
    entries = leaderboard(cells)
    config = cells[0].config
    seeds = sorted({cell.config.seed for cell in cells})
    done = sum(cell.result is not None for cell in cells)
    lead = f"Test error over {len(seeds)} seeds; {done} of {len(cells)} runs are finished."
    record = _record(cells)
    lead += sentence(meta_note(record))
    by_method: dict[str, dict[float, tuple[float, float]]] = {}
    for entry in entries:
        if entry.majority is not None:
            by_method.setdefault(entry.method, {})[entry.majority] = (entry.mean, entry.deviation)
    sections = [
        (
            "Test error, %",
            "<p>Mean and deviation over seeds; the lowest mean over all seeds is set off.</p>" + _errors(entries),
        ),
        ("", figures.error_by_majority(by_method) if len(shares(entries)) > 1 else ""),
        (f"Difference to {config.method}, paired by seed", _differences(entries, config.method)),
        ("Error against cost", _costs(entries, config.method)),
        ("Accuracy on each class, %", _by_class(entries, record.get("class_names", []))),
        ("", settings([(name, str(value)) for name, value in config.identity().items() if name not in _VARIED])),
    ]
    title = f"{len({entry.method for entry in entries})} methods on {config.data}"
    path.write_text(page(title, lead, sections), encoding="utf-8")
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
    areas = len(majorities) == 1 and not math.isnan(entries[0].area)
    head = [*_head(majorities), *["area under ROC"] * areas, "steps", "batch", "seconds a run", "plain steps"]
    rows, best, most = [head], [], most_seeds(entries)
    for method in methods:
        own = [known.get((method, majority)) for majority in majorities]
        found = [entry for entry in own if entry]
        texts = ["-" if entry is None else mean_text(entry, most) for entry in own]
        texts += [plus_minus(entry.area) for entry in found if areas]
        texts += [count_text(fmean(entry.steps for entry in found)), count_text(found[0].batch)]
        seconds, cost = fmean(entry.seconds for entry in found), fmean(entry.cost for entry in found)
        rows.append([method, *texts, f"{seconds:.0f}", count_text(cost)])
    for column, majority in enumerate(majorities, start=1):
        column_of = {row: known.get((method, majority)) for row, method in enumerate(methods, 1)}
        means = {row: entry.mean for row, entry in column_of.items() if entry and entry.seeds == most}
        best += [(min(means, key=means.__getitem__), column)] if means else []
    return table(rows, best=best)


def _differences(entries: Sequence[Entry], first: str) -> str:
    methods, majorities, known = _axes(entries)
    rows = [_head(majorities)]
    for method in methods:
        if method != first:
            own = [known.get((method, majority)) for majority in majorities]
            rows.append([method, *("-" if e is None else plus_minus(e.difference, e.interval, sign="+") for e in own)])
    return "<p>Percentage points of test error, with 95 % confidence intervals (Student's t).</p>" + table(rows)


def _costs(entries: Sequence[Entry], first: str) -> str:
    points = {}
    for entry in entries:
        if not math.isnan(entry.cost):
            label = entry.method if entry.majority is None else f"{entry.method}, {100 * entry.majority:g} %"
            points[label] = entry.cost, entry.mean, entry.deviation
    text = (
        f"<p>Cost is the median time of a run, preparation and evaluations included, divided by the time that {first} "
        f"takes for a step. It is a measurement: what else the machine did meanwhile is in it.</p>"
    )
    return text + (figures.error_by_cost(points) if points else "")


def _record(cells: Sequence[Cell]) -> dict[str, Any]:
    """The config.json of a finished cell, {} if there is none."""
    for cell in cells:
        if cell.result is not None and cell.folder is not None and (cell.folder / "config.json").is_file():
            return read_json(cell.folder / "config.json")
    return {}


def _by_class(entries: Sequence[Entry], names: Sequence[str]) -> str:
    """All classes if there are at most twenty, otherwise the worst, the median and the best."""
    many = max((len(entry.accuracies) for entry in entries), default=0)
    head = [names[k] if k < len(names) else str(k) for k in range(many)] if many <= 20 else ["worst", "median", "best"]
    rows = [["method", *head]]
    for entry in entries:
        known = sorted(value for value in entry.accuracies if not math.isnan(value))
        shown = entry.accuracies if many <= 20 else [known[0], known[len(known) // 2], known[-1]]
        label = entry.method if entry.majority is None else f"{entry.method}, {100 * entry.majority:g} %"
        rows.append([label, *(plus_minus(value) for value in shown)])
    return table(rows)
