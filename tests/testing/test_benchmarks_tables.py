"""Tables come from the last whole run on a clean tree, and say what was not measured."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.runs import Row

WHERE = {"threads": "2", "dirty": "no", "device": "a machine", "torch": "2", "commit": "c"}
FIGURES = {"ratio_p20": "1", "ratio_p80": "3"}


def row(date: str, case: str, provider: str, ratio: str = "", peak: str = "", status: str = "measured") -> Row:
    found = {"case": case, "provider": provider, "ratio": ratio, "peak_ratio": peak, "status": status}
    return WHERE | FIGURES | {"date": date} | found


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def write(rows: list[Row]) -> None:
        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        with (tmp_path / "meta-steps-cpu.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    return write


def test_a_later_run_of_a_few_ways_takes_nothing_away(written) -> None:
    whole = [row("2030-01-01", "mlc a", way, "2", "1") for way in ("plain", "metakern")]
    written([*whole, row("2030-01-02", "mlc a", "plain", "1")])
    assert tables.runs_of("meta-steps") == {"mlc a": {entry["provider"]: entry for entry in whole}}


def test_of_the_last_commit_the_run_in_the_middle(written) -> None:
    before = row("2030-01-01", "mlc a", "metakern", "9") | {"commit": "b"}
    same = [row(f"2030-01-0{day}", "mlc a", "metakern", ratio) for day, ratio in ((2, "3"), (3, "1"), (4, "2"))]
    written([before, *same])
    assert tables.runs_of("meta-steps") == {"mlc a": {"metakern": same[2]}}


def test_meta_steps_have_time_memory_and_the_best_of_the_others(written) -> None:
    over = "over the error budget, in budgets: dots 0, gradient 758"
    written(
        [
            row("2030-01-01", "metabalance a", "metakern", "2", "1.5"),
            row("2030-01-01", "metabalance a", "metakern central_difference", status=over),
            row("2030-01-01", "metabalance a", "double_backward (published)", "2.5", "2"),
            row("2030-01-01", "metabalance a", "higher", "2.25", "3"),
            row("2030-01-01", "metabalance a", "torchopt", "2.2", "4"),
            row("2030-01-01", "mwnet a", "metakern", "2", "1.5"),
            row("2030-01-01", "mwnet a", "metakern compiled", "1.5"),
            row("2030-01-01", "mwnet a", "higher", status="not installed: higher"),
        ]
    )
    lines = tables.meta_steps().splitlines()
    spread = "(1.00 - 3.00)"
    assert f"| a | 2.00 {spread} | 1.50 | 1.50 {spread} | - | - | - | - | - | not measured | - |" in lines
    ours, theirs = f"2.00 {spread} | 1.50", f"2.50 {spread} | 2.00 | 2.20 {spread}, torchopt | 4.00"
    assert lines[-1] == f"| a | {ours} | over the error budget | - | {theirs} |"
