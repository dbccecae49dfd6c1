"""The tables of the experiments' pages are those of the committed files."""

import csv
import runpy
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLISH = ROOT / "experiments" / "leaderboards" / "publish.py"
NOISE = ROOT / "experiments" / "label_noise"
WHOLE = ROOT / "experiments" / "l2rw_mnist" / "whole.csv"


@pytest.mark.parametrize("name", ["PAGE", "README"])
def test_pages_show_the_committed_leaderboards(name: str) -> None:
    publish = runpy.run_path(str(PUBLISH))
    page = publish[name].read_text()
    assert "<!-- table: " in page
    assert publish["with_tables"](page) == page


def whole_schedule() -> dict[tuple[str, str], list[float]]:
    """Test errors of the seeds, by method and share of the majority."""
    found: dict[tuple[str, str], list[float]] = {}
    with WHOLE.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["method"], row["majority"]), []).append(float(row["test_error"]))
    return found


def test_page_of_the_whole_schedule() -> None:
    table = WHOLE.with_name("README.md").read_text().split("## All ratios")[0]
    for (method, majority), errors in whole_schedule().items():
        cells = next(line for line in table.splitlines() if line.startswith(f"| `{method}` |")).split("|")
        column = 3 + ["0.9", "0.95", "0.98", "0.99", "0.995"].index(majority)
        spread = f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f} ({len(errors)})"
        assert cells[column].strip() == spread, (method, majority)


@pytest.mark.parametrize("method", ["l2rw", "proportion", "uniform"])
def test_whole_schedule_on_the_first_page(method: str) -> None:
    errors = whole_schedule()[method, "0.995"]
    assert f"{statistics.mean(errors):.1f}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["PAGE", "GUIDE"])
def test_pages_show_the_committed_curves(name: str) -> None:
    publish = runpy.run_path(str(NOISE / "publish.py"))
    page = publish[name].read_text()
    assert "<!-- table: " in page
    assert publish["with_tables"](page) == page


@pytest.mark.parametrize("method", ["uniform", "l2rw", "clean-only"])
def test_label_noise_on_the_first_page(method: str) -> None:
    publish = runpy.run_path(str(NOISE / "publish.py"))
    errors = publish["curves"]()[method, publish["SET_OF_CURVES"]][1000]
    assert f"{statistics.mean(errors):.1f}" in (ROOT / "README.md").read_text()
