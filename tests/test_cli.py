import json
import os
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import metakern
from metakern.cli import main
from metakern.data import NAMES
from metakern.methods import METHODS

QUICK = ["--steps", "4", "--batch-size", "20", "--evaluations", "2", "--threads", "1", "--majority", "0.9"]


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("METAKERN_DATA", raising=False)


def test_run_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["metakern", "list"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("metakern", run_name="__main__")
    assert "l2rw" in capsys.readouterr().out


def test_output_that_nobody_reads_to_the_end():
    process = subprocess.Popen(
        [sys.executable, "-m", "metakern", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()  # as `head` does
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


def test_train_leaves_a_report(tmp_path, capsys):
    assert main(["train", "random", *QUICK, "--seed", "3", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "test error" in shown
    assert str(tmp_path / "run" / "report.html") in shown
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3
    for name in ("metrics.csv", "weights.csv", "weights.npz", "result.json", "report.html"):
        assert (tmp_path / "run" / name).is_file()


def test_progress_shows_loss_kept_and_speed(tmp_path, capsys):
    main(["train", "random", *QUICK, "--steps", "40", "--out", str(tmp_path)])
    shown = capsys.readouterr().err
    assert "loss=" in shown
    assert "kept=" in shown
    assert "step/s" in shown


def test_compare_and_report(tmp_path, capsys):
    arguments = ["compare", "--methods", "uniform,resample", "--seeds", "0-1", *QUICK, "--out", str(tmp_path)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "resample" in first
    assert (tmp_path / "leaderboard.csv").is_file()
    assert (tmp_path / "report.html").is_file()
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    runs = [str(path) for path in sorted((tmp_path / "cells").iterdir())]
    assert main(["report", *runs, "--out", str(tmp_path / "all.html")]) == 0
    assert "resample, seed 1" in (tmp_path / "all.html").read_text()


def test_reports_of_several_runs_and_of_a_comparison(tmp_path, capsys):
    """Runs side by side have a page of their own; that of a comparison is made anew out of its cells."""
    arguments = ["compare", "--methods", "resample,uniform", "--seeds", "0-1", *QUICK, "--out", str(tmp_path)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    runs = sorted((tmp_path / "cells").iterdir())
    assert main(["report", *map(str, runs)]) == 0
    assert "uniform, seed 1" in (tmp_path / "cells" / "report.html").read_text()
    assert not any((run / "report.html").exists() for run in runs)
    page = (tmp_path / "report.html").read_text()
    for name in ("report.html", "leaderboard.csv"):
        (tmp_path / name).unlink()
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "report.html").read_text() == page
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == page
    # One that is not over shows what it has, in the same order.
    (runs[0] / "result.json").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert "3 of 4 runs are finished" in (tmp_path / "report.html").read_text()
    for run in runs[1:]:
        (run / "result.json").unlink()
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_demo_ends_with_a_table(tmp_path, capsys, monkeypatch):
    def step(model, batch, meta_batch, *, optimizer, engine):
        losses = torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return SimpleNamespace(
            weights=torch.ones(len(losses)), losses=losses.detach(), meta_loss=losses.mean().detach()
        )

    from metakern.trainers import demo

    plain = demo.demo_config(None)
    monkeypatch.setattr(metakern, "l2rw_step", step, raising=False)
    monkeypatch.setattr(
        "metakern.trainers.commands.demo_config", lambda _: plain.__class__("uniform", majority=0.9, steps=3, threads=1)
    )
    assert main(["demo", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "step, in plain steps" in shown
    assert str(tmp_path / "report.html") in shown


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*METHODS, *NAMES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "l3rw"], "unknown method 'l3rw'; there are: uniform"),
        (["train", "uniform", "--data", "mnist-1v2"], "unknown data set 'mnist-1v2'; there are: digits-4v9"),
        (["train", "uniform", "--majority", "1.5"], "majority must be in"),
        (["train", "uniform", "--steps", "0"], "--steps must be at least 1"),
        (["compare", "--methods", "uniform,l3rw"], "unknown method 'l3rw'"),
        (["report", "no-such-folder"], "holds no finished run"),
        (["train", "uniform", "--data", "mnist-4v9"], "published: "),
        (["train", "uniform", "--out", f"{__file__}/run", *QUICK], "Not a directory: "),
    ],
)
def test_unusable_input_is_said_in_a_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "4-0", "takes seeds, as in 0-4 or 0,2,5, got '4-0'"),
        ("--seeds", "one", "takes seeds, as in 0-4 or 0,2,5, got 'one'"),
        ("--majority", ",", "takes shares, as in 0.9,0.995, got ','"),
    ],
)
def test_words_that_name_no_seed_or_share(option, value, message, capsys):
    with pytest.raises(SystemExit):
        main(["compare", option, value])
    assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"metakern {metakern.__version__}\n"


def test_what_is_wrong_with_options_is_said_in_a_line(capsys):
    for arguments, said in (
        (["train"], "metakern train: the following arguments are required: METHOD; 'metakern train --help' lists"),
        (["train", "l2rw", "--lr"], "metakern train: argument --lr: expected one argument; "),
        ([], "metakern: the following arguments are required: COMMAND; 'metakern --help' lists the options"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        shown = capsys.readouterr().err
        assert shown.startswith(said)
        assert shown.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "compare", "audit", "episodes", "demo", "report", "check"])
def test_options_say_what_they_take(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert not re.search(r"--[\w-]+ X\b", shown)
    assert "None" not in shown


def test_check_takes_a_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "beside_mine.py").write_text("WIDTH = 3\n")
    (tmp_path / "models" / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from beside_mine import WIDTH\n"
        "@dataclass\nclass Sizes:\n    width: int = WIDTH\n"
        "def ok():\n"
        "    batch = torch.randn(4, Sizes().width), torch.randint(0, 2, (4,))\n"
        "    return torch.nn.Linear(WIDTH, 2), batch, batch\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert main(["check", "models/mine.py:ok"]) == 0
    for name, said in (("models/mine.py:no", "has no attribute 'no'"), ("models/yours.py:ok", "No such file")):
        assert main(["check", name]) == 2
        assert said in capsys.readouterr().err
    for name in ("mine", "beside_mine"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since Python 3.11")
def test_notes_of_an_error_are_shown(tmp_path, capsys):
    (tmp_path / "failing.py").write_text(
        "import torch\n"
        "def fails(model, batch):\n    raise ValueError('no such class')\n"
        "def example():\n"
        "    batch = torch.randn(4, 3), torch.randint(0, 2, (4,))\n"
        "    return torch.nn.Linear(3, 2), batch, batch, fails\n"
    )
    assert main(["check", f"{tmp_path / 'failing.py'}:example"]) == 2
    assert capsys.readouterr().err == "metakern: no such class\n(raised while metakern computed the losses of batch)\n"


def test_files_are_utf8_whatever_the_locale_says(tmp_path):
    lines = ["text,kind", *(f"{'今天天气很好' if k % 2 else '质量太差了'}{k},{'好差'[k % 2]}" for k in range(40))]
    (tmp_path / "own.csv").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["train", "mw-net", *QUICK[:-2], "--data", f"csv:{tmp_path / 'own.csv'}", "--label", "kind"]
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "utf-8",
    }
    command = [sys.executable, "-m", "metakern", *arguments, "--out", str(tmp_path / "run")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert "<td>好</td>" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_without_the_optional_packages(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "metakern.trainers.commands", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for name in [name for name in sys.modules if name.startswith("metakern.trainers")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["list"]) == 2
    assert "tqdm is not installed; try: pip install -e '.[train]'" in capsys.readouterr().err
