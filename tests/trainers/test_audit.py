import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakern.cli import main
from metakern.data import Examples, Source, Task
from metakern.data.sampling import shuffled
from metakern.trainers import audit as audit_module
from metakern.trainers import audit_command
from metakern.trainers.audit import Audit, audit
from metakern.trainers.audit_command import run_audit
from metakern.trainers.detection import cleanlab_suspicion, detection, has_cleanlab, held_out_probabilities
from metakern.trainers.loop import make_task
from metakern.trainers.networks import network_for
from metakern.trainers.optimizer import make_optimizer
from metakern.trainers.report.audit import write_page, write_table


@pytest.fixture
def noisy(quick):
    return replace(quick, data="digits", majority=None, noise="symmetric", noise_rate=0.2, train_size=200, lr=0.01)


def test_values_are_the_sum_of_lr_times_dot(noisy):
    """Against the gradients of single examples along the same training run."""
    config = replace(noisy, steps=3, train_size=30, meta_per_class=1)
    task = make_task(config)
    found = audit(config, task, progress=False)
    model = network_for(task, config.seed)
    optimizer = make_optimizer(config, model)
    expected, seen = np.zeros(len(task.train)), np.zeros(len(task.train), bool)
    generator = torch.Generator().manual_seed(config.seed + 2)
    batches = shuffled(task.train.targets, 20, generator)
    for _ in range(3):
        rows = next(batches)
        meta = torch.autograd.grad(
            F.cross_entropy(model(task.meta.inputs), task.meta.targets), list(model.parameters())
        )
        for row in rows.tolist():
            loss = F.cross_entropy(model(task.train.inputs[row : row + 1]), task.train.targets[row : row + 1])
            own = torch.autograd.grad(loss, list(model.parameters()))
            expected[row] += config.lr / 20 * sum((a * b).sum().item() for a, b in zip(own, meta, strict=True))
            seen[row] = True
        optimizer.zero_grad()
        F.cross_entropy(model(task.train.inputs[rows]), task.train.targets[rows]).backward()
        optimizer.step()
    np.testing.assert_allclose(found.value[seen], expected[seen], rtol=1e-3, atol=1e-6)
    assert np.isnan(found.value[~seen]).all()


def made_up() -> Audit:
    value = np.array([0.1, -0.5, 0.3, np.nan])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [np.nan, np.nan]])
    return Audit(value, 2 * value, np.array([1.0, 3.0, 2.0, np.nan]), probabilities)


def made_up_task(inputs: torch.Tensor) -> Task:
    train = Examples(inputs, torch.tensor([0, 1, 1, 0]), torch.tensor([3, 2, 1, 0]))
    return Task("made-up", train, train, train, ("a", "b"), train.targets)


def test_rates_rise_and_fall_as_in_a_run(noisy):
    """With plain descent and one step the value is proportional to the rate, which a warm-up halves."""
    config = replace(noisy, steps=1, momentum=0.0, batch_size=20)
    task = make_task(config)
    whole, half = audit(config, task, progress=False), audit(replace(config, warmup=1.0, steps=2), task, progress=False)
    seen = ~np.isnan(whole.value)
    task_rows = next(shuffled(task.train.targets, 20, torch.Generator().manual_seed(config.seed + 2)))
    assert seen.nonzero()[0].tolist() == sorted(task_rows.tolist())
    np.testing.assert_array_equal(half.value[seen] * 2, whole.value[seen])


def test_predictions_leave_no_trace(noisy, monkeypatch):
    """They are made in evaluation mode: dropout does not blur them, and BatchNorm sees each batch once."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    monkeypatch.setattr("metakern.trainers.audit.network_for", lambda *_: network)
    audit(replace(noisy, steps=5), make_task(noisy), progress=False)
    assert int(network[2].num_batches_tracked) == 5


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_cudnn")
def test_on_a_gpu(noisy):
    """As on the CPU: the first steps, before rounding has grown."""
    config = replace(noisy, steps=3)
    task = make_task(config)
    here, there = audit(config, task, progress=False), audit(replace(config, device="cuda"), task, progress=False)
    np.testing.assert_allclose(there.loss, here.loss, rtol=1e-3)
    assert np.corrcoef(np.nan_to_num(here.value), np.nan_to_num(there.value))[0, 1] > 0.999
    probabilities = held_out_probabilities(replace(config, device="cuda"), task, folds=2)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)


def test_options_without_an_effect_are_not_taken(capsys):
    for option in ("--amp", "--early-stopping", "--augment"):
        with pytest.raises(SystemExit):
            main(["audit", option, "1"])
        assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_found_out_before_the_work(noisy, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(audit_command, "audit", None)
    with pytest.raises(FileExistsError):
        run_audit(noisy, tmp_path / "file")


def test_order_and_suggestion():
    found = made_up()
    assert found.harmful_first().tolist() == [1, 0, 2, 3]
    assert found.suggested.tolist() == [0, 0, 1, -1]


def test_table_and_page_of_text(tmp_path):
    task = made_up_task(torch.zeros(4, 3, dtype=torch.int64))
    source = Source("made-up", task.train, task.test, ("a", "b"), readable=["t0", "t1", "t<2>", "t3"])
    with write_table(made_up(), task, source, tmp_path / "audit.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["2", "3", "1", "0"]
    assert (rows[0]["given_label"], rows[0]["suggested_label"], rows[0]["text"]) == ("b", "a", "t<2>")
    page = write_page(made_up(), task, source, {}, [], tmp_path / "audit.html", top=2).read_text()
    assert "t&lt;2&gt;" in page
    assert "t1" not in page
    assert (rows[3]["suggested_label"], rows[3]["confidence"]) == ("", "nan")
    assert "1 have another suggested label than the given one. 1 have no suggestion" in page


@pytest.mark.parametrize("shape", [(4, 5), (4, 1, 6, 6), (4, 3, 6, 6)])
def test_page_of_rows_and_pictures(tmp_path, shape):
    task = made_up_task(torch.randn(*shape))
    source = Source("made-up", task.train, task.test, ("a", "b"))
    page = write_page(made_up(), task, source, {}, ["a note"], tmp_path / "audit.html").read_text()
    assert ("<img" in page) == (len(shape) == 4)
    assert "a note" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_detection_by_hand():
    wrong = np.array([True, False, True, False, False])
    found = detection(np.array([5.0, 4.0, 3.0, 2.0, np.nan]), wrong)
    assert found.area == pytest.approx(5 / 6)  # of six pairs, the second wrong one comes after one right one
    assert found.precision[-1] == 0.5
    assert found.precision[0] == 1
    # Equal suspicion says nothing, whichever row comes first.
    assert detection(np.zeros(5), wrong).area == detection(np.zeros(5), wrong[::-1].copy()).area == 0.5
    assert detection(np.array([2.0, 2.0, 1.0, np.nan, np.nan]), wrong).area == pytest.approx(4.5 / 6)
    with pytest.raises(ValueError, match="got 0 of 5 wrong"):
        detection(np.arange(5.0), np.zeros(5, bool))


def test_held_out_probabilities_are_held_out(noisy):
    task = make_task(replace(noisy, steps=200))
    probabilities = held_out_probabilities(replace(noisy, steps=40), task, folds=2)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)


@pytest.mark.skipif(not has_cleanlab(), reason="cleanlab is not installed")
def test_cleanlab_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7]])
    np.testing.assert_allclose(cleanlab_suspicion(np.array([0, 0]), probabilities), [0.1, 0.7], atol=1e-6)


def test_command_finds_planted_errors(noisy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit_command, "has_cleanlab", lambda: False)
    arguments = ["--data", "digits", "--noise", "symmetric", "--noise-rate", "0.2", "--steps", "60", "--threads", "1"]
    assert main(["audit", *arguments, "--lr", "0.01", "--top", "12", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "highest loss" in shown
    assert "cleanlab: left out, it is not installed" in shown
    page = (tmp_path / "audit.html").read_text()
    assert page.count("<img") == 12
    assert "Wrong labels found" in page
    assert (tmp_path / "audit.json").is_file()


def audited(folder: Path, *data: str) -> tuple[list[dict[str, str]], str]:
    """The rows of audit.csv and the page of an audit from the command line."""
    options = ["--steps", "60", "--lr", "0.05", "--batch-size", "20", "--threads", "1", "--out", str(folder)]
    assert main(["audit", "--data", *data, *options]) == 0
    with (folder / "audit.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), (folder / "audit.html").read_text(encoding="utf-8")


def test_own_table(tmp_path, capsys):
    lines = [
        "dose,kind,split",
        *(f"{(k % 2) + k / 1000},{'ab'[k % 2]},{'meta' if k < 8 else 'train'}" for k in range(80)),
    ]
    lines[40] = lines[40].replace("b", "a")  # the fortieth row below the head
    (tmp_path / "own.csv").write_text("\n".join(lines))
    rows, page = audited(tmp_path / "out", f"csv:{tmp_path / 'own.csv'}", "--label", "kind")
    assert (rows[0]["row"], rows[0]["given_label"], rows[0]["suggested_label"]) == ("40", "a", "b")
    assert rows[0]["cells"] == "dose 1.039"
    assert "dose 1.039" in page
    assert "training examples against 8 clean ones" in page
    assert {row["file"] for row in rows} == {str(tmp_path / "own.csv")}


def test_own_texts(tmp_path):
    lines = ["text,kind", *(f'"{("good fine", "bad poor")[k % 2]}, text {k}\nand more",{k % 2}' for k in range(60))]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    rows, page = audited(tmp_path / "out", f"csv:{tmp_path / 'own.csv'}", "--label", "kind")
    assert len(rows) == 48 - 10
    assert "training examples against 10 others, with the labels they have" in page
    for row in rows:
        # A record of the user's file, however many lines it has.
        assert (
            row["text"]
            == f"{('good fine', 'bad poor')[(int(row['row']) - 1) % 2]}, text {int(row['row']) - 1}\nand more"
        )


def test_own_pictures(tmp_path):
    from PIL import Image

    for k in range(20):
        for name, shade in (("dark", 20), ("light", 220)):
            path = tmp_path / "photos" / ("light" if (name, k) == ("dark", 3) else name) / f"{name}{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), shade + k % 5).save(path)
    rows, page = audited(tmp_path / "out", f"images:{tmp_path / 'photos'}", "--top", "5")
    assert "row" not in rows[0]
    for row in rows:
        assert Path(row["file"]).parent.name == row["given_label"]
        assert Path(row["file"]).is_file()
    assert page.count("<img") == 5
    assert Path(rows[0]["file"]).name in page


def test_audit_of_clean_labels_judges_nothing(quick, tmp_path):
    assert "ranking" not in run_audit(quick, tmp_path, progress=False)


@pytest.mark.parametrize(("option", "message"), [("--top", "--top must be at least 1"), ("--folds", "--folds must be")])
def test_unusable_options(option, message, capsys, tmp_path):
    value = "0" if option == "--top" else "1"
    assert main(["audit", option, value, "--out", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_run_that_diverges_fails_and_leaves_what_it_measured(steps, capsys, tmp_path):
    """In its last step as in any other; nothing beside the table says that the audit is complete."""
    (tmp_path / "audit.html").touch()  # of an earlier audit
    given = ["--data", "digits-4v9", "--steps", str(steps), "--lr", "1e30", "--threads", "1", "--out", str(tmp_path)]
    assert main(["audit", *given]) == 2
    said = capsys.readouterr().err
    assert f"step {min(steps, 2)}: " in said
    assert "finite" in said
    assert f"what had been measured by then is in {tmp_path / 'audit.csv'}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["audit.csv"]
    with (tmp_path / "audit.csv").open(newline="", encoding="utf-8") as file:
        assert any(row["value"] not in ("", "nan") for row in csv.DictReader(file))


def test_a_first_step_that_fails_leaves_no_table(quick, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError("not finite")

    monkeypatch.setattr(audit_module, "predict", fail)
    with pytest.raises(ValueError, match=r"^step 1: not finite$"):
        run_audit(quick, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
