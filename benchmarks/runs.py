"""Rows read back: of each case its last run, as docs/performance.md says which that is."""

import csv
from collections.abc import Collection
from pathlib import Path

Row = dict[str, str]
Run = dict[str, Row]
"""Rows by way, of one case."""
Runs = dict[str, Run]
"""By case."""

NAMES_BEFORE = {"double_backward (math)": "double_backward (short, math)"}


def last_runs(path: Path, needed: Collection[str], threads: str = "2") -> Runs:
    """Each case's last run on a clean tree, with so many threads, that included the needed ways; metakern is one.

    Where a commit was run several times, the run in the middle: short steps depend on where a process has its memory.
    """
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["threads"] == threads and row["dirty"] == "no"]
    runs: dict[str, dict[tuple[str, str], Run]] = {}
    for row in rows:
        run = runs.setdefault(row["case"], {}).setdefault((row["date"], row["commit"]), {})
        run[NAMES_BEFORE.get(row["provider"], row["provider"])] = row
    found: Runs = {}
    for case, of_case in runs.items():
        whole = [run for run in of_case.values() if set(needed) <= set(run)]
        if whole:
            same = [run for run in whole if run["metakern"]["commit"] == whole[-1]["metakern"]["commit"]]
            found[case] = sorted(same, key=_ratio)[len(same) // 2]
    return found


def _ratio(run: Run) -> float:
    """0 where nothing is timed (plans): runs of one commit are alike there."""
    return float(run["metakern"]["ratio"] or 0)
