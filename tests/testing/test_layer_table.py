"""docs/layers.md has a row for every entry of the catalogue, and what it says is what the engines owe."""

import re
from pathlib import Path

import pytest

from metakern import layer_table
from metakern.testing.catalogue import CASES, NETWORKS, Case

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
WRITE_IT = "run: python -m metakern.layer_table > docs/layers.md"


def rows() -> dict[str, list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "---" not in line][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_rows_are_the_catalogue() -> None:
    assert list(rows()) == [case.name for case in [*CASES, *NETWORKS]], WRITE_IT


@pytest.mark.parametrize("case", [*CASES, *NETWORKS], ids=lambda case: case.name)
def test_a_row_says_what_is_owed(case: Case) -> None:
    ghost, two_pass, jvp, _, auto = rows()[case.name]
    for cell, owes in ((ghost, case.ghost), (two_pass, case.ghost), (jvp, case.jvp)):
        assert owes == "either" or (cell == "rejected") == (owes == "refuse"), WRITE_IT
        assert cell == "rejected" or float(cell) <= 1e-12
    assert auto in ("ghost", "jvp", "rejected")
    assert case.auto != "exact" or auto != "rejected", WRITE_IT


def test_every_refusal_has_its_reason() -> None:
    listed = PAGE.read_text().split("## Why rejected")[1]
    for name, cells in rows().items():
        assert ("rejected" not in cells[:4]) or re.search(rf"[ ,]{re.escape(name)}[ ,]", listed), WRITE_IT


def test_a_row_is_written_from_a_run() -> None:
    case = next(case for case in CASES if case.name == "batch-norm-train")
    row = layer_table.row(case, sizes=[(4, 2)])
    assert row.auto == "jvp"
    assert isinstance(row.cells["jvp"], float)
    assert "examples interact" in str(row.cells["ghost"])
    page = layer_table.page([row])
    assert "| batch-norm-train | rejected | rejected |" in page
    assert "* batch-norm-train by ghost: examples interact" in page
