"""The table of a comparison: mean and spread over seeds, and differences paired by seed."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from metakern.methods import find
from metakern.trainers.compare import Cell


class Entry(NamedTuple):
    """One method at one majority share: test error in percent over its seeds, and its difference to the first method.

    `steps` is the median over its runs, `batch` the number of training examples in each step; both are 0 for methods
    without steps. `difference` is the mean over the seeds that both methods have; `interval` is half its 95 %
    confidence interval (Student's t), nan with fewer than two seeds. `area` is the mean area under the ROC curve in
    percent, nan unless there are two classes. `accuracies` is the mean accuracy on each class. `cost` is the median
    time of a run in plain steps: its seconds divided by the seconds per step of the first method; nan if that method
    has no steps.
    """

    method: str
    majority: float | None
    seeds: int
    mean: float
    deviation: float
    lowest: float
    highest: float
    difference: float
    interval: float
    area: float
    seconds: float
    cost: float
    steps: int
    batch: int
    accuracies: list[float]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _half_interval(values: Sequence[float]) -> float:
    from scipy.stats import t

    if len(values) < 2:
        return math.nan
    return float(t.ppf(0.975, len(values) - 1)) * _spread(values)[1] / math.sqrt(len(values))


Results = dict[int, dict[str, Any]]  # by seed


def leaderboard(cells: Sequence[Cell]) -> list[Entry]:
    """One entry for each method and majority share with a finished cell, in the order of `cells`."""
    groups: dict[tuple[str, float | None], Results] = {}
    for cell in cells:
        if cell.result is not None:
            groups.setdefault((cell.config.method, cell.config.majority), {})[cell.config.seed] = cell.result
    first = cells[0].config if cells else None
    return [
        _entry(method, majority, results, groups.get((first.method, majority), {}), first.batch_size)
        for (method, majority), results in groups.items()
        if first is not None
    ]


def _entry(method: str, majority: float | None, results: Results, reference: Results, batch: int | None) -> Entry:
    errors = [result["test_error"] for result in results.values()]
    paired = [results[seed]["test_error"] - reference[seed]["test_error"] for seed in results if seed in reference]
    seconds = median(result["seconds"] for result in results.values())
    plain = [result["seconds"] / result["steps"] for result in reference.values() if result["steps"]]
    mean, deviation = _spread(errors)
    steps = int(median(result["steps"] for result in results.values()))
    by_class = zip(*(result["error_by_class"] for result in results.values()), strict=True)
    return Entry(
        method,
        majority,
        len(errors),
        mean,
        deviation,
        min(errors),
        max(errors),
        _spread(paired)[0] if paired else math.nan,
        _half_interval(paired),
        _spread([result.get("roc_area", math.nan) for result in results.values()])[0],
        seconds,
        seconds / median(plain) if plain else math.nan,
        steps,
        (batch or find(method).batch_size) if steps else 0,
        [100 - _spread(own)[0] for own in by_class],
    )


def save(entries: Sequence[Entry], path: Path) -> None:
    """Write the entries as CSV, one row each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Entry._fields)
        writer.writerows([_field(value) for value in row] for row in entries)


def _field(value: object) -> object:
    if isinstance(value, list):
        return " ".join(f"{part:.6g}" for part in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def shares(entries: Sequence[Entry]) -> list[float | None]:
    """The majority shares in `entries`, ascending; [None] for more than two classes."""
    return sorted({entry.majority for entry in entries}, key=lambda share: share or 0.0)


def as_text(entries: Sequence[Entry]) -> str:
    """A table to print: methods down, majority shares across, test error in percent as mean +- deviation."""
    majorities = shares(entries)
    methods = list(dict.fromkeys(entry.method for entry in entries))
    by_key = {(entry.method, entry.majority): entry for entry in entries}

    def shown(method: str, majority: float | None) -> str:
        entry = by_key.get((method, majority))
        return "-" if entry is None else mean_text(entry, most)

    most = most_seeds(entries)
    rows = [["test error, %"] + ["" if majority is None else f"{majority:g}" for majority in majorities]]
    rows += [[method] + [shown(method, majority) for majority in majorities] for method in methods]
    if len(majorities) == 1:
        # One table has room for the rest.
        rows[0] += ["difference", "area under ROC", "plain steps", "steps", "batch"]
        for row in rows[1:]:
            entry = by_key[row[0], majorities[0]]
            row += [plus_minus(entry.difference, entry.interval, "+"), plus_minus(entry.area)]
            row += [count_text(entry.cost), count_text(entry.steps), count_text(entry.batch)]
    return aligned(rows)


def most_seeds(entries: Sequence[Entry]) -> int:
    """Of how many seeds a complete mean is."""
    return max((entry.seeds for entry in entries), default=0)


def mean_text(entry: Entry, most: int) -> str:
    """Mean and deviation of the test error; of how many seeds, if other means are of more (`most`)."""
    return plus_minus(entry.mean, entry.deviation) + (f" ({entry.seeds} of {most} seeds)" if entry.seeds < most else "")


def count_text(number: float) -> str:
    """A number of steps or examples; a dash where there are none."""
    return f"{number:,.0f}" if number > 0 else "-"


def plus_minus(value: float, spread: float = math.nan, sign: str = "") -> str:
    """The value with two decimals and, if there is one, its spread."""
    if math.isnan(value):
        return "-"
    return format(value, f"{sign}.2f") + ("" if math.isnan(spread) else f" ± {spread:.2f}")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns: the first to the left, the others to the right; a rule under the first row."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        padded[0] = row[0].ljust(widths[0])
        lines.append("  ".join(padded))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
