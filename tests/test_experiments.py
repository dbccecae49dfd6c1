"""The tables of the experiments' pages are those of the committed files."""

import runpy
from pathlib import Path

import pytest

PUBLISH = Path(__file__).parents[1] / "experiments" / "leaderboards" / "publish.py"


@pytest.mark.parametrize("name", ["PAGE", "README"])
def test_pages_show_the_committed_leaderboards(name: str) -> None:
    publish = runpy.run_path(str(PUBLISH))
    page = publish[name].read_text()
    assert "<!-- table: " in page
    assert publish["with_tables"](page) == page
