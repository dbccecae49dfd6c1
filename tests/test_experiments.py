"""The tables of the experiments' pages are those of the committed files."""

import csv
import runpy
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLISH = ROOT / "experiments" / "leaderboards" / "publish.py"
WHOLE = ROOT / "experiments" / "l2rw_mnist" / "whole.csv"


@pytest.mark.parametrize("name", ["PAGE", "README"])
def test_pages_show_the_committed_leaderboards(name: str) -> None:
    publish = runpy.run_path(str(PUBLISH))
    page = publish[name].read_text()
    assert "<!-- table: " in page
    assert publish["with_tables"](page) == page


@pytest.mark.parametrize(("page", "digits"), [("README.md", 1), ("experiments/l2rw_mnist/README.md", 2)])
@pytest.mark.parametrize("method", ["l2rw", "proportion", "uniform"])
def test_whole_schedule(method: str, page: str, digits: int) -> None:
    with WHOLE.open(newline="") as file:
        errors = [float(row["test_error"]) for row in csv.DictReader(file) if row["method"] == method]
    assert f"{statistics.mean(errors):.{digits}f}" in (ROOT / page).read_text().split("## All ratios")[0]
