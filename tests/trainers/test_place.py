"""Where commands write: a finished run is never lost to a typo, nor to the next run of a sweep."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from metakern.cli import main
from metakern.methods import METHODS
from metakern.trainers import audit_command, commands, loop, train
from metakern.trainers.checkpoint import stored_identity
from metakern.trainers.run_folder import finished

QUICK = ["--majority", "0.9", "--steps", "4", "--batch-size", "20", "--evaluations", "2", "--threads", "1"]
TRAIN = ["train", "uniform", *QUICK]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Default folders are under the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path: Path, *, shift: int = 0) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("x,y\n" + "".join(f"{(k + shift) % 7},{'ab'[k % 2]}\n" for k in range(40)))
    return f"csv:{path}"


@pytest.mark.parametrize("more", [["--model", "resnet33"], ["--lr", "1e30"], ["--data", "digits-5v9"]])
def test_a_finished_run_survives_a_typo(here, capsys, more):
    out = ["--out", "keep"]
    assert main([*TRAIN, *out]) == 0
    before = files(here / "keep")
    assert main([*TRAIN, *out, *more]) == 2
    said = capsys.readouterr().err
    assert f"keep holds a finished run with other settings ({more[0]} " in said
    assert f"now {more[1].replace('1e30', '1e+30')}); name another folder with --out, or replace it with --over" in said
    assert files(here / "keep") == before


def test_files_of_somebody_else_are_not_written_over(here, capsys):
    (here / "own").mkdir()
    (here / "own" / "model.pt").write_text("precious")
    before = files(here)
    assert main([*TRAIN, "--out", "own"]) == 2
    assert "own holds files that are not those of a run (model.pt); name another folder" in capsys.readouterr().err
    assert files(here) == before
    assert main([*TRAIN, "--out", "own", "--overwrite"]) == 0
    assert (here / "own" / "result.json").exists()


def test_what_cannot_run_touches_nothing(here, quick):
    assert main([*TRAIN, "--out", "keep"]) == 0
    before = files(here / "keep")
    assert main([*TRAIN, "--out", "keep", "--model", "resnet33", "--overwrite"]) == 2
    assert files(here / "keep") == before
    assert main([*TRAIN, "--out", "new", "--model", "resnet33"]) == 2
    assert not (here / "new").exists()
    with pytest.raises(ValueError, match="unknown --model"):
        train(replace(quick, model="resnet33"), here / "keep", progress=False)
    assert files(here / "keep") == before


def test_overwrite_replaces_all_that_the_run_had_left(here, monkeypatch):
    assert main([*TRAIN, "--out", "keep"]) == 0
    (here / "keep" / "corrected.csv").touch()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "require_finite", None)  # fails in its first step
        with pytest.raises(TypeError):
            main([*TRAIN, "--lr", "0.5", "--out", "keep", "--overwrite"])
    assert set(files(here / "keep")) == {"config.json", "metrics.csv", "failed_batch.pt"}
    assert main([*TRAIN, "--lr", "0.5", "--out", "keep"]) == 0
    assert json.loads((here / "keep" / "result.json").read_text())["identity"]["lr"] == 0.5


def test_a_sweep_takes_a_folder_for_each_run(here, capsys):
    for rate in ("0.1", "0.2", "0.3", "0.2"):
        assert main([*TRAIN, "--lr", rate]) == 0
    first = "digits-4v9-0.9-uniform-0"
    assert {path.name for path in (here / "runs").iterdir()} == {first, f"{first}-2", f"{first}-3"}
    said = capsys.readouterr().err
    assert f"runs/{first} holds a finished run with other settings (--lr 0.1, now 0.2); writing to" in said
    assert f"runs/{first}-2 already has this run" in said


def test_tables_of_one_name_in_two_folders(here):
    for folder in ("one", "two"):
        data = ["--data", table(here / folder / "own.csv"), "--label", "y", "--meta-per-class", "1"]
        assert main(["train", "uniform", *QUICK[2:], *data]) == 0
    assert {path.name for path in (here / "runs").iterdir()} == {"csv-own-uniform-0", "csv-own-uniform-0-2"}


def test_a_table_that_has_changed(here, capsys):
    for shift, status in ((0, 0), (1, 2)):
        data = ["--data", table(here / "own.csv", shift=shift), "--label", "y", "--meta-per-class", "1"]
        assert main(["train", "uniform", *QUICK[2:], *data, "--out", "keep"]) == status
    assert "files have changed since" in capsys.readouterr().err


def test_a_finished_run_is_shown_and_not_repeated(here, capsys, monkeypatch):
    assert main(TRAIN) == 0
    first = capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(commands, "train", None)
        assert main(TRAIN) == 0
    again = capsys.readouterr()
    assert again.out == first
    assert "already has this run; --overwrite runs it again" in again.err
    before = (here / "runs/digits-4v9-0.9-uniform-0/result.json").stat().st_mtime_ns
    assert main([*TRAIN, "--overwrite"]) == 0
    assert (here / "runs/digits-4v9-0.9-uniform-0/result.json").stat().st_mtime_ns > before


def test_an_unfinished_run_is_kept_as_well(here, quick, monkeypatch):
    """And one that overwrites it does not leave its checkpoint behind, beside metrics that are another's."""
    config = replace(quick, checkpoint_seconds=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", None)
        with pytest.raises(TypeError):
            train(config, here / "keep", progress=False)
    assert main([*TRAIN, "--out", "keep"]) == 2
    assert stored_identity(here / "keep") == config.identity()
    monkeypatch.setattr(loop, "require_finite", None)
    with pytest.raises(TypeError):
        main([*TRAIN, "--out", "keep", "--overwrite"])
    assert stored_identity(here / "keep") is None


def test_checkpoints_from_before_an_option_go_on(here, quick, monkeypatch):
    def older(config, contents=None):
        return {name: value for name, value in config.identity().items() if name != "leave_out"}

    with monkeypatch.context() as patch:
        patch.setattr(loop, "identity", older)
        patch.setattr(loop, "finish", None)
        with pytest.raises(TypeError):
            train(replace(quick, checkpoint_seconds=0.0), here / "run", progress=False)
    monkeypatch.setitem(METHODS, "uniform", replace(METHODS["uniform"], begin=lambda setup: None))  # no step is taken
    train(quick, here / "run", progress=False)
    assert finished(here / "run", quick) is not None


@pytest.mark.parametrize(("name", "content"), [("checkpoint.pt", b""), ("checkpoint.pt", b"PK"), ("result.json", b"{")])
def test_damaged_files_are_named(here, capsys, name, content):
    (here / "keep").mkdir()
    (here / "keep" / name).write_bytes(content)
    assert main([*TRAIN, "--out", "keep"]) == 2
    assert f"keep/{name} cannot be read; remove it to begin" in capsys.readouterr().err
    (here / "keep" / name).unlink()
    assert main([*TRAIN, "--out", "keep"]) == 0


def test_what_could_not_be_measured_is_null(here, capsys):
    """JSON has no nan; a class without test examples has no error."""
    rows = [f"{k % 7},{'abc'[k % 3]},{'test' if k > 30 and k % 3 else 'train'}" for k in range(60)]
    (here / "own.csv").write_text("\n".join(["x,y,split", *rows]))
    given = ["train", "uniform", *QUICK[2:], "--data", "csv:own.csv", "--label", "y", "--out", "keep"]
    assert main(given) == 0
    first = capsys.readouterr().out
    stored = json.loads((here / "keep" / "result.json").read_text(), parse_constant=pytest.fail)
    assert stored["error_by_class"][0] is None
    assert stored["roc_area"] is None
    assert main(given) == 0
    assert capsys.readouterr().out == first


def test_comparisons_of_other_settings(here, capsys):
    many = ["compare", "--methods", "uniform", "--seeds", "0", *QUICK]
    assert main([*many, "--lr", "0.1"]) == 0
    before = files(here / "runs/compare")
    assert main([*many, "--lr", "0.2"]) == 0
    assert files(here / "runs/compare") == before
    assert (here / "runs/compare-2/leaderboard.csv").is_file()
    assert main([*many, "--lr", "0.2", "--out", "runs/compare"]) == 2
    assert "(--lr 0.1, now 0.2); name another folder" in capsys.readouterr().err
    assert files(here / "runs/compare") == before
    assert main([*many, "--lr", "0.2", "--out", "runs/compare", "--overwrite"]) == 0
    assert files(here / "runs/compare") != before


def test_comparisons_of_other_runs(here, capsys):
    """More seeds or methods are added to a table, other ones do not replace it, unless the folder is named."""
    many = ["compare", "--methods", "uniform", *QUICK]
    assert main([*many, "--seeds", "0"]) == 0
    assert main([*many, "--seeds", "0-1", "--threads", "2"]) == 0
    assert [path.name for path in (here / "runs").iterdir()] == ["compare"]
    before = files(here / "runs/compare")
    assert main([*many, "--seeds", "2"]) == 0
    said = capsys.readouterr().err
    first, second = "digits-4v9-0.9-uniform-0", "digits-4v9-0.9-uniform-1"
    assert f"compare holds a comparison with other runs ({first}, {second}); writing to runs/compare-2 instead" in said
    assert files(here / "runs/compare") == before
    assert main([*many, "--seeds", "2", "--out", "runs/compare"]) == 0
    assert len(list((here / "runs/compare/cells").iterdir())) == 3


def test_a_folder_in_use(here, capsys):
    """By another process; what it has written so far does not say whose the folder is."""
    name = "runs/digits-4v9-0.9-uniform-0"
    holder = f"from metakern.trainers.claim import claimed\nwith claimed(Path({name!r})): print(1, flush=True), input()"
    command = [sys.executable, "-c", f"from pathlib import Path\n{holder}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        assert main([*TRAIN, "--out", name]) == 2
        assert f"{name} is in use by another command; wait for it" in capsys.readouterr().err
        assert main(TRAIN) == 0
        assert f"{name} is in use by another command; writing to {name}-2 instead" in capsys.readouterr().err
        other.communicate("\n")
    assert [path.name for path in (here / "runs").iterdir()] == [f"{Path(name).name}-2"]
    assert ".lock" not in files(here / f"{name}-2")
    assert main(TRAIN) == 0


def test_a_claim_ends_with_its_process(here):
    """However that ends: what a killed one leaves does not keep the next one out."""
    (here / "own").mkdir()
    (here / "own" / ".lock").touch()
    assert main([*TRAIN, "--out", "own"]) == 0


def test_audits_are_kept_apart(here, capsys, monkeypatch):
    own = ["audit", *QUICK[2:6], "--threads", "1", "--label", "y", "--meta-per-class", "1"]
    assert main([*own, "--data", table(here / "own.csv")]) == 0
    first, before = capsys.readouterr().out, files(here / "runs/csv-own-audit-0")
    with monkeypatch.context() as patch:
        patch.setattr(audit_command, "audit", None)
        assert main([*own, "--data", f"csv:{here / 'own.csv'}"]) == 0
    again = capsys.readouterr()
    assert again.out == first
    assert "already has this audit" in again.err
    # Corrected labels are audited beside what was found before.
    assert main([*own, "--data", table(here / "own.csv", shift=1)]) == 0
    assert files(here / "runs/csv-own-audit-0") == before
    assert (here / "runs/csv-own-audit-0-2/audit.json").is_file()
    assert main([*own, "--data", f"csv:{here / 'own.csv'}", "--out", "runs/csv-own-audit-0"]) == 2
    assert "holds an audit with other settings (files have changed since)" in capsys.readouterr().err
