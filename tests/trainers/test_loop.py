import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import metakern
from metakern.trainers import train
from metakern.trainers.ledger import Ledger
from metakern.trainers.metrics import read_metrics
from metakern.trainers.networks import network_for
from metakern.trainers.report import write_report
from metakern.trainers.run_folder import finished
from metakern.trainers.task import make_task


def test_a_run_leaves_its_records(quick, tmp_path):
    run = train(replace(quick, method="random"), tmp_path, progress=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["method"] == "random"
    assert config["train_examples"] == len(run.task.train)
    assert config["steps"] == 6
    assert config["metakern"] == metakern.__version__
    assert config["torch"] == torch.__version__
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert metrics["step"] == [2, 4, 6]
    assert metrics["test_error"][-1] == pytest.approx(run.errors.test, rel=1e-5)
    assert all(0 < kept < 1 for kept in metrics["kept"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["test_error"] == run.errors.test
    assert 0 < result["macro_f1"] == run.errors.macro_f1 < 100
    assert result["steps"] == 6
    assert np.mean(result["error_by_class"]) == pytest.approx(result["balanced_error"])


def test_ledger_adds_up(quick, tmp_path):
    run = train(replace(quick, steps=40), tmp_path, progress=False)
    with np.load(tmp_path / "weights.npz", allow_pickle=False) as stored:
        columns = {name: stored[name] for name in stored.files}
    assert columns["times_seen"].sum() == 36 * 20  # the first tenth of the run is left out
    seen = columns["times_seen"] > 0
    np.testing.assert_allclose(columns["mean_weight"][seen], 1, rtol=1e-6)  # n * (1 / n)
    np.testing.assert_array_equal(columns["id"], run.task.train.ids)
    with (tmp_path / "weights.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(run.task.train)
    assert float(rows[0]["id"]) == columns["id"][0]


def test_ids_are_written_in_all_their_digits(quick, tmp_path):
    task = make_task(quick)
    task = replace(task, train=replace(task.train, ids=task.train.ids + 12_345_678))
    Ledger(task, 10).save(tmp_path)
    with (tmp_path / "weights.csv").open() as file:
        assert [int(row["id"]) for row in csv.DictReader(file)] == task.train.ids.tolist()


def test_same_seed_same_run(quick, tmp_path):
    first, again, other = (
        train(replace(quick, seed=seed), tmp_path / str(k), progress=False) for k, seed in enumerate((3, 3, 4))
    )
    state = first.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    assert any(not torch.equal(value, state[name]) for name, value in other.model.state_dict().items())


def test_methods_start_alike_and_see_the_same_batches(quick):
    task = make_task(quick)
    first, second = (network_for(task, quick.seed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("method", ["resample", "hard-mining", "hard-mining-as-shipped", "proportion-as-shipped"])
def test_every_baseline_runs(quick, tmp_path, method):
    assert finished(tmp_path, replace(quick, method=method)) is None
    train(replace(quick, method=method), tmp_path, progress=False)
    assert finished(tmp_path, replace(quick, method=method)) is not None


def test_a_result_counts_for_its_own_config_only(quick, tmp_path):
    train(quick, tmp_path, progress=False)
    assert finished(tmp_path, replace(quick, threads=2, data_dir="elsewhere")) is not None
    assert finished(tmp_path, replace(quick, lr=0.1)) is None


def test_nonfinite_loss_stops_and_leaves_no_result(quick, tmp_path):
    with pytest.raises(ValueError, match=r"step \d+: the loss of \d+ of 20 examples is not finite"):
        train(replace(quick, lr=1e30), tmp_path, progress=False)
    assert finished(tmp_path, replace(quick, lr=1e30)) is None


def test_a_last_step_that_diverges_leaves_its_batch_and_no_result(quick, tmp_path):
    config = replace(quick, lr=1e30, steps=1)
    with pytest.raises(ValueError, match=r"step 1: the prediction of 90 of 90 examples is not finite; .*failed_batch"):
        train(config, tmp_path, progress=False)
    assert finished(tmp_path, config) is None
    assert torch.load(tmp_path / "failed_batch.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize("method", ["self-training", "adaboost-networks", "forward-correction"])
def test_networks_aside_that_diverge_leave_no_result(quick, tmp_path, method):
    config = replace(quick, method=method, data="digits", majority=None, lr=1e30)
    with pytest.raises(ValueError, match=r"its loss is not finite|the prediction of \d+ of \d+ examples is not finite"):
        train(config, tmp_path, progress=False)
    assert finished(tmp_path, config) is None


def test_training_learns(quick, tmp_path):
    run = train(replace(quick, method="resample", steps=120), tmp_path, progress=False)
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert metrics["loss"][-1] < metrics["loss"][0] / 2
    assert run.errors.test < 25


def test_many_classes_with_noise(quick, tmp_path):
    many = replace(quick, data="digits", majority=None, noise="symmetric", noise_rate=0.4, imbalance=5.0)
    run = train(many, tmp_path, progress=False)
    assert run.errors.by_class
    assert len(run.errors.by_class) == 10
    with np.load(tmp_path / "weights.npz") as stored:
        flipped = stored["label"] != stored["clean_label"]
    assert 0.2 < flipped.mean() < 0.6
    assert many.name() == "digits-imbalance5-symmetric0.4-uniform-0"


def test_two_classes_take_a_majority_and_noise(quick, tmp_path):
    config = replace(quick, method="mw-net", noise="symmetric", noise_rate=0.3)
    clean, noised = make_task(quick), make_task(config)
    assert noised.name == "digits-4v9 at majority 0.9, 30 % symmetric noise"
    assert torch.equal(noised.train.ids, clean.train.ids)
    assert torch.equal(noised.clean_targets, clean.train.targets)
    run = train(config, tmp_path, progress=False)
    with np.load(tmp_path / "weights.npz") as stored:
        assert 0.15 < (stored["label"] != stored["clean_label"]).mean() < 0.45
    assert run.config.name() == "digits-4v9-0.9-symmetric0.3-mw-net-0"


def test_options_of_the_other_kind_of_set_are_refused(quick):
    with pytest.raises(ValueError, match="digits-4v9 takes --majority and --noise"):
        make_task(replace(quick, imbalance=2.0))
    with pytest.raises(ValueError, match="digits takes --imbalance and --noise"):
        make_task(replace(quick, data="digits"))


def test_a_result_from_before_an_option_existed_still_counts(quick, tmp_path):
    train(quick, tmp_path, progress=False)
    path = tmp_path / "result.json"
    result = json.loads(path.read_text())
    del result["identity"]["noise"]
    path.write_text(json.dumps(result))
    assert finished(tmp_path, quick) is not None
    assert finished(tmp_path, replace(quick, noise="uniform", noise_rate=0.2)) is None


def test_a_run_from_before_a_version_was_noted_still_counts(quick, tmp_path):
    train(quick, tmp_path, progress=False)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "metakern"}))
    assert finished(tmp_path, quick) is not None
    assert write_report([tmp_path], tmp_path / "again.html").is_file()
