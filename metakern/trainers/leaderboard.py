"""The table of a comparison: mean and spread over seeds, and differences paired by seed."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from metakern.trainers.compare import Cell


class Entry(NamedTuple):
    """One method at one majority share: test error in percent over its seeds, and its difference to the first method.

    `difference` is the mean over the seeds both have; `interval` is half its 95 % confidence interval (Student's t),
    nan with fewer than two seeds.
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
    seconds: float


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


def leaderboard(cells: Sequence[Cell]) -> list[Entry]:
    """One entry for each method and majority share that has a finished cell, in the order of `cells`."""
    errors: dict[tuple[str, float | None], dict[int, float]] = {}
    seconds: dict[tuple[str, float | None], float] = {}
    for cell in cells:
        if cell.result is not None:
            key = cell.config.method, cell.config.majority
            errors.setdefault(key, {})[cell.config.seed] = cell.result["test_error"]
            seconds[key] = seconds.get(key, 0.0) + cell.result["seconds"]
    first = cells[0].config.method if cells else ""
    entries = []
    for (method, majority), by_seed in errors.items():
        reference = errors.get((first, majority), {})
        paired = [by_seed[seed] - reference[seed] for seed in by_seed if seed in reference]
        mean, deviation = _spread(list(by_seed.values()))
        entries.append(
            Entry(
                method,
                majority,
                len(by_seed),
                mean,
                deviation,
                min(by_seed.values()),
                max(by_seed.values()),
                _spread(paired)[0] if paired else math.nan,
                _half_interval(paired),
                seconds[method, majority] / len(by_seed),
            )
        )
    return entries


def save(entries: Sequence[Entry], path: Path) -> None:
    """Write the entries as CSV, one row each."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Entry._fields)
        writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in entries)


def shares(entries: Sequence[Entry]) -> list[float | None]:
    """The majority shares in `entries`, rising; [None] for sets of more than two classes."""
    return sorted({entry.majority for entry in entries}, key=lambda share: share or 0.0)


def as_text(entries: Sequence[Entry]) -> str:
    """A table to print: methods down, majority shares across, test error in percent as mean +- deviation."""
    majorities = shares(entries)
    methods = list(dict.fromkeys(entry.method for entry in entries))
    by_key = {(entry.method, entry.majority): entry for entry in entries}

    def shown(method: str, majority: float | None) -> str:
        entry = by_key.get((method, majority))
        if entry is None:
            return "-"
        return f"{entry.mean:.2f}" + ("" if math.isnan(entry.deviation) else f" ± {entry.deviation:.2f}")

    rows = [["test error, %"] + ["" if majority is None else f"{majority:g}" for majority in majorities]]
    rows += [[method] + [shown(method, majority) for majority in majorities] for method in methods]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as columns: the first to the left, the others to the right, a rule under the first row."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        padded[0] = row[0].ljust(widths[0])
        lines.append("  ".join(padded))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
