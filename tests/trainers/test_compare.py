import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metakern.data import contents
from metakern.methods import METHODS
from metakern.trainers import compare, loop
from metakern.trainers.compare import Cell, cell, chosen, grid, run_missing
from metakern.trainers.leaderboard import Entry, as_text, leaderboard, save
from metakern.trainers.loop import train
from metakern.trainers.report import write_comparison
from metakern.trainers.task import make_source


def test_grid_refuses_unknown_methods(quick):
    with pytest.raises(ValueError, match="unknown method 'no-such'"):
        grid(quick, ["uniform", "no-such"], [0.9], [0])


def test_settings_go_to_the_methods_that_have_them(quick, tmp_path):
    base = replace(quick, set="every=2,rule=floor")
    configs = grid(base, ["uniform", "l2rw", "mw-net"], [0.9], [0])
    assert [config.set for config in configs] == ["", "rule=floor", "every=2"]
    folders = [cell(tmp_path, config).folder.name for config in configs]
    assert folders[1] == f"{quick.data}-0.9-l2rw-rule=floor-0"
    with pytest.raises(ValueError, match="none of uniform, l2rw has a setting 'every'"):
        grid(base, ["uniform", "l2rw"], [0.9], [0])
    run = train(replace(configs[1], steps=2), tmp_path / "run", progress=False)
    assert (run.folder / "result.json").is_file()


def test_interrupted_comparison_gives_the_same_table(quick, tmp_path):
    configs = grid(quick, ["uniform", "resample"], [0.9], [0, 1])
    whole = run_missing(tmp_path / "whole", configs, jobs=2, progress=False)
    run_missing(tmp_path / "parts", configs[:1], progress=False)
    # A run that was killed half-way: it has a config but no result.
    killed = cell(tmp_path / "parts", configs[1])
    killed.folder.mkdir(parents=True)
    (killed.folder / "config.json").write_text("{")
    resumed = run_missing(tmp_path / "parts", configs, progress=False)
    tables = [[entry._replace(seconds=0, cost=0) for entry in leaderboard(cells)] for cells in (whole, resumed)]
    assert [repr(table) for table in tables] == [repr(tables[0])] * 2
    first = (tmp_path / "parts" / "cells" / configs[0].data).parent
    assert len(list(first.iterdir())) == 4


def test_methods_by_what_they_are_for():
    noise, imbalance = chosen(["noise"]), chosen(["imbalance"])
    assert {"uniform", "l2rw", "mw-net", "reed-hard"} <= set(noise)
    assert {"uniform", "l2rw", "mw-net-imbalance", "smote"} <= set(imbalance)
    assert not {"smote", "mw-net-imbalance"} & set(noise)
    assert chosen(["noise", "imbalance", "uniform"]) == list(dict.fromkeys(noise + imbalance))
    assert {*noise, *imbalance} == set(METHODS)
    assert chosen(["smote", "metabalance-smote-undersample"]) == ["smote", "metabalance-smote-undersample"]
    with pytest.raises(ValueError, match="unknown method 'nois'"):
        chosen(["nois"])
    with pytest.raises(ValueError, match="--methods does not name any method"):
        chosen([])


def test_killed_in_the_middle_of_a_run_gives_the_same_table(quick, tmp_path, monkeypatch):
    base = replace(quick, checkpoint_seconds=0.0)
    configs = grid(base, ["uniform", "mw-net"], [0.9], [0, 1])
    whole = run_missing(tmp_path / "whole", configs, progress=False)
    original, steps = loop.require_finite, []

    def killed_at_the_third_step_of_the_third_run(*arguments):
        steps.append(None)
        if len(steps) == 15:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "require_finite", killed_at_the_third_step_of_the_third_run)
        with pytest.raises(KeyboardInterrupt):
            run_missing(tmp_path / "killed", configs, progress=False)
    before = [cell(tmp_path / "killed", config) for config in configs]
    assert [entry.result is not None for entry in before] == [True, True, False, False]
    assert (before[2].folder / "checkpoint.pt").is_file()
    resumed = run_missing(tmp_path / "killed", configs, progress=False)
    tables = [[entry._replace(seconds=0, cost=0) for entry in leaderboard(cells)] for cells in (whole, resumed)]
    assert repr(tables[0]) == repr(tables[1])
    for first, second in zip(whole, resumed, strict=True):
        assert (first.folder / "weights.csv").read_bytes() == (second.folder / "weights.csv").read_bytes()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_method_that_does_not_take_the_data_is_left_out(quick, tmp_path, capsys, jobs):
    base = replace(quick, data="digits", majority=None, steps=2)
    configs = grid(base, ["proportion-as-shipped", "uniform", "random"], [None], [0])
    cells = run_missing(tmp_path, configs, jobs=jobs, progress=False)
    assert [cell.result is not None for cell in cells] == [False, True, True]
    assert "proportion-as-shipped is skipped: " in capsys.readouterr().err
    assert [entry.method for entry in leaderboard(cells)] == ["uniform", "random"]


def test_a_first_method_without_steps(quick, tmp_path):
    cells = run_missing(tmp_path, grid(quick, ["adaboost", "uniform"], [0.9], [0]), progress=False)
    assert [math.isnan(entry.cost) for entry in leaderboard(cells)] == [True, True]
    assert write_comparison(cells, tmp_path / "report.html").is_file()
    assert "uniform" in as_text(leaderboard(cells))


def test_finished_cells_are_not_run_again(quick, tmp_path, monkeypatch):
    configs = grid(quick, ["uniform"], [0.9], [0])
    run_missing(tmp_path, configs, progress=False)
    monkeypatch.setattr(compare, "train", None)
    written = cell(tmp_path, configs[0]).folder / "result.json"
    before = written.stat().st_mtime_ns
    run_missing(tmp_path, configs, progress=False)
    assert written.stat().st_mtime_ns == before


def test_the_data_are_read_once_and_give_what_a_run_alone_gives(quick, tmp_path, monkeypatch):
    configs = grid(quick, ["uniform", "resample"], [0.9, 0.8], [0, 1])
    read = []
    monkeypatch.setattr(compare, "make_source", lambda config: read.append(config) or make_source(config))
    cells = run_missing(tmp_path / "grid", configs, progress=False)
    assert len(read) == 1
    for config, together in zip(configs, cells, strict=True):
        alone = train(config, tmp_path / "alone" / config.name(), progress=False)
        assert together.result is not None
        assert alone.errors.by_class == together.result["error_by_class"]


def test_a_changed_file_is_read_again_by_the_next_comparison(quick, tmp_path):
    table = tmp_path / "own.csv"
    base = replace(quick, data=f"csv:{table}", majority=None, label="y", steps=2, meta_per_class=1)
    sizes = []
    for rows in (40, 80):
        table.write_text("x,y\n" + "".join(f"{k % 7},{'ab'[k % 2]}\n" for k in range(rows)))
        cells = run_missing(tmp_path / "cells", grid(base, ["uniform"], [None], [0]), progress=False)
        assert "No rows are marked as meta" in write_comparison(cells, tmp_path / "report.html").read_text()
        sizes.append(json.loads((cells[0].folder / "config.json").read_text())["train_examples"])
    assert sizes == [30, 62]
    # Where the file is gone the results stay what they were.
    table.unlink()
    assert run_missing(tmp_path / "cells", [cells[0].config], progress=False)[0].result is not None


def test_a_run_of_a_changed_file_does_not_go_on_from_its_checkpoint(quick, tmp_path, monkeypatch):
    table = tmp_path / "own.csv"
    own = {"data": f"csv:{table}", "majority": None, "label": "y", "meta_per_class": 1}
    config = replace(quick, **own, steps=4, checkpoint_seconds=0.0)
    table.write_text("x,y\n" + "".join(f"{k % 7},{'ab'[k % 2]}\n" for k in range(40)))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", None)
        with pytest.raises(TypeError):
            train(config, tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
    table.write_text("x,y\n" + "".join(f"{k % 5},{'ab'[k % 2]}\n" for k in range(40)))
    again, alone = (train(config, tmp_path / name, progress=False) for name in ("run", "alone"))
    assert (again.folder / "weights.csv").read_bytes() == (alone.folder / "weights.csv").read_bytes()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, alone.model.state_dict()[name])


def test_a_changed_image_changes_the_contents(tmp_path):
    for name in ("a/0.png", "b/0.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0")
    found = contents(f"images:{tmp_path}")
    (tmp_path / "b/notes.txt").write_bytes(b"1")
    assert contents(f"images:{tmp_path}") == found
    (tmp_path / "b/0.png").write_bytes(b"1")
    assert contents(f"images:{tmp_path}") != found
    assert contents("digits") is None
    assert contents(f"images:{tmp_path}/none") is None


def test_contents_are_of_the_images_that_are_read(tmp_path):
    """Also in a class's folder that is a link; neither hidden ones, nor those beside train and test."""
    for name in (
        "own/train/a/0.png",
        "own/test/a/0.png",
        "own/spare/a/0.png",
        "own/train/a/._0.png",
        "elsewhere/0.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"0")
    (tmp_path / "own/train/b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = contents(f"images:{tmp_path}/own")
    for name, changes in (
        *(("own/spare/a/0.png", False), ("own/train/a/._0.png", False)),
        *(("own/test/a/0.png", True), ("elsewhere/0.png", True)),
    ):
        (tmp_path / name).write_bytes(b"1")
        assert (contents(f"images:{tmp_path}/own") != found) is changes
        (tmp_path / name).write_bytes(b"0")


def test_comparison_of_many_classes(quick, tmp_path):
    base = replace(quick, data="digits", majority=None, steps=2)
    cells = run_missing(tmp_path, grid(base, ["uniform", "random"], [None], [0, 1]), progress=False)
    assert "test error" in as_text(leaderboard(cells))
    text = write_comparison(cells, tmp_path / "report.html").read_text()
    assert "2 methods on digits" in text


def result(error: float, method: str) -> dict:
    seconds = {"uniform": 2.0, "l2rw": 3.0}[method]
    by_class = [error - 1, error + 1]
    return {"test_error": error, "seconds": seconds, "steps": 100, "error_by_class": by_class, "roc_area": 100 - error}


def made_up(quick, errors: dict[str, list[float]]) -> list[Cell]:
    return [
        Cell(replace(quick, method=method, seed=seed), None, result(error, method))
        for method, row in errors.items()
        for seed, error in enumerate(row)
    ]


def test_leaderboard_by_hand(quick, tmp_path):
    entries = leaderboard(made_up(quick, {"uniform": [10, 12, 14], "l2rw": [5, 6, 10]}))
    uniform, l2rw = entries
    assert (uniform.mean, uniform.deviation, uniform.seeds) == (12, 2, 3)
    assert (l2rw.lowest, l2rw.highest, l2rw.difference) == (5, 10, -5)
    # Differences -5, -6, -4: deviation 1, t(0.975, 2) = 4.3027.
    assert l2rw.interval == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    text = as_text(entries)
    assert "12.00 ± 2.00" in text
    assert "7.00 ± 2.65" in text
    assert "-5.00 ± 2.48" in text
    # 100 steps took uniform 2 s, so 3 s are 150 of them.
    assert (uniform.cost, l2rw.cost) == (100, pytest.approx(150))
    assert uniform.area == 88
    assert uniform.accuracies == [89, 87]
    save(entries, tmp_path / "leaderboard.csv")
    with (tmp_path / "leaderboard.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["uniform", "l2rw"]


def test_methods_of_other_lengths_are_told_apart(quick, tmp_path):
    """By their papers uniform takes 8000 steps and l2rw 4000; adaboost has none."""
    base = replace(quick, steps=None, batch_size=None, schedule=1 / 2000)
    cells = run_missing(tmp_path, grid(base, ["uniform", "l2rw", "adaboost"], [0.9], [0]), progress=False)
    entries = leaderboard(cells)
    assert [(entry.steps, entry.batch) for entry in entries] == [(4, 100), (2, 100), (0, 0)]
    save(entries, tmp_path / "leaderboard.csv")
    with (tmp_path / "leaderboard.csv").open() as file:
        assert [(row["steps"], row["batch"]) for row in csv.DictReader(file)] == [
            ("4", "100"),
            ("2", "100"),
            ("0", "0"),
        ]
    head, _, uniform, l2rw, adaboost = (re.split(r"  +", line) for line in as_text(entries).splitlines())
    assert head[-2:] == ["steps", "batch"]
    assert [uniform[-2:], l2rw[-2:], adaboost[-2:]] == [["4", "100"], ["2", "100"], ["-", "-"]]
    text = write_comparison(cells, tmp_path / "report.html").read_text()
    assert "<th>steps</th><th>batch</th>" in text
    assert "<td>4</td><td>100</td>" in text
    assert "<td>2</td><td>100</td>" in text
    given = run_missing(tmp_path, grid(quick, ["uniform"], [0.9], [1]), progress=False)
    assert [(entry.steps, entry.batch) for entry in leaderboard(given)] == [(6, 20)]


def test_columns_of_the_leaderboard_are_documented():
    page = (Path(__file__).parents[2] / "docs" / "methods" / "runs.md").read_text()
    table = page[page.index("`leaderboard.csv`, and the report") :]
    assert set(Entry._fields) <= set(re.findall(r"`(\w+)`", table))


def test_leaderboard_of_one_seed_and_of_an_unfinished_one(quick, tmp_path):
    cells = [*made_up(quick, {"uniform": [10], "l2rw": [5]}), Cell(replace(quick, seed=9), tmp_path, None)]
    entries = leaderboard(cells)
    assert [entry.seeds for entry in entries] == [1, 1]
    assert math.isnan(entries[1].deviation)
    text = write_comparison(cells, tmp_path / "report.html").read_text()
    assert "2 of 3 runs are finished" in text
    assert "nan" not in text
    assert "Error against cost" in text


def test_means_over_fewer_seeds_say_so(quick, tmp_path):
    """And are not the lowest mean, which they may be by the seeds that they have."""
    entries = leaderboard(cells := made_up(quick, {"uniform": [10, 12, 14], "l2rw": [5, 6]}))
    assert "12.00 ± 2.00 " in as_text(entries)
    assert "5.50 ± 0.71 (2 of 3 seeds)" in as_text(entries)
    text = write_comparison(cells, tmp_path / "report.html").read_text()
    assert "<td>5.50 ± 0.71 (2 of 3 seeds)</td>" in text
    assert "<td class=best>12.00 ± 2.00</td>" in text


def test_comparison_shows_each_class(quick, tmp_path):
    cells = run_missing(tmp_path, grid(quick, ["uniform"], [0.9], [0]), progress=False)
    text = write_comparison(cells, tmp_path / "report.html").read_text()
    assert "Accuracy on each class" in text
    assert "<th>4</th><th>9</th>" in text
