"""The tables of the experiments' pages are those of the committed files."""

import csv
import runpy
import statistics
from pathlib import Path

import pytest

from metakern.trainers.pretrained import Encoder, tokenizer

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


def test_mlrnet_page_shows_the_committed_file() -> None:
    folder = ROOT / "experiments" / "mlrnet_agnews"
    page = (folder / "README.md").read_text()
    with (folder / "expected.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert f"{row['accuracy']} ± {row['deviation']}" in page, (row["bias"], row["method"])


def test_metabalance_page_shows_the_committed_runs() -> None:
    publish = runpy.run_path(str(ROOT / "experiments" / "metabalance_credit" / "publish.py"))
    page = publish["PAGE"].read_text()
    assert page.count("<!-- table: ") == 5
    assert publish["with_tables"](page) == page
    runs = publish["runs"]()
    assert len(runs) == 2 * (len(publish["METHODS"]) + len(publish["SAMPLERS"]) ** 2 - 1)
    assert {len(rows) for rows in runs.values()} == {3}


def test_an_encoder_is_pretrained_on_texts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the experiment's script leaves in its folder is what `--model transformers:DIR` reads."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    news, folder = tmp_path / "ag_news", tmp_path / "encoder"
    news.mkdir()
    for name in ("train.csv", "test.csv"):
        with (news / name).open("w", newline="") as file:
            csv.writer(file).writerows([1 + k % 4, f"the {k % 3} cats", "sat on the mat"] for k in range(70))
    monkeypatch.setenv("METAKERN_DATA", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["pretrain.py", str(folder), "1"])
    runpy.run_path(str(ROOT / "experiments" / "mlrnet_agnews" / "pretrain.py"), run_name="__main__")
    tokens = tokenizer(folder)(["the cats sat", "on"])
    assert tokens.shape == (2, 64)
    assert Encoder(folder, 4)(tokens).shape == (2, 4)
