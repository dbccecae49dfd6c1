"""Options of the loop: optimizer and learning rate, early stopping, bfloat16, TensorBoard; what a failure leaves."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from metakern.methods import METHODS, find
from metakern.trainers import loop, train
from metakern.trainers.config import TrainConfig
from metakern.trainers.early_stopping import EarlyStopping
from metakern.trainers.evaluate import Errors
from metakern.trainers.metrics import read_metrics
from metakern.trainers.optimizer import make_optimizer, rate_factor
from metakern.trainers.task import hold_out, make_task


def test_course_of_the_learning_rate():
    config = TrainConfig("uniform", warmup=0.2, drops="0.5,0.8")
    assert [rate_factor(config, step, 10) for step in range(10)] == pytest.approx(
        [0.5, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]
    )
    assert {rate_factor(TrainConfig("uniform"), step, 10) for step in range(10)} == {1.0}


def test_the_rate_reaches_the_optimizer(quick, tmp_path, monkeypatch):
    rates = []
    plain = METHODS["uniform"]

    def begin(setup):
        def step(model, batch, meta_batch, *, optimizer, setting):
            rates.append(optimizer.param_groups[0]["lr"])
            return plain.begin(setup)(model, batch, meta_batch, optimizer=optimizer, setting=setting)

        return step

    monkeypatch.setitem(METHODS, "uniform", replace(plain, begin=begin))
    train(replace(quick, lr=0.3, warmup=0.5, drops="0.5"), tmp_path, progress=False)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.03, 0.03, 0.03])


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("nesterov", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_optimizers(name, kind):
    optimizer = make_optimizer(TrainConfig("uniform", optimizer=name, weight_decay=0.5), nn.Linear(1, 1))
    assert type(optimizer).__name__ == kind
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert bool(optimizer.param_groups[0].get("nesterov")) == (name == "nesterov")


@pytest.mark.parametrize(
    ("option", "value"),
    [("optimizer", "lion"), ("amp", "fp16"), ("warmup", 1.5), ("drops", "50"), ("early_stopping", 0)],
)
def test_refusals_name_the_option(option, value):
    with pytest.raises(ValueError, match="--" + option.replace("_", "-")):
        TrainConfig("uniform", **{option: value})


def test_held_out_examples_leave_training(quick):
    task = make_task(quick)
    smaller, validation = hold_out(task, 0.25, 3)
    ids = [set(part.ids.tolist()) for part in (smaller.train, validation)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == set(task.train.ids.tolist())
    assert len(validation) == round(0.25 * len(task.train))
    assert len(smaller.clean_targets) == len(smaller.train)
    with pytest.raises(ValueError, match=r"--validation 0 of \d+ training examples"):
        hold_out(task, 0.0, 3)


def test_early_stopping_by_hand():
    model, stopping = nn.Linear(1, 1), EarlyStopping(2)
    for step, error in enumerate((5.0, 3.0, 3.0, 4.0), start=1):
        assert not stopping.over
        nn.init.constant_(model.weight, step)
        stopping.add(step, error, model)
    assert stopping.over
    stopping.restore(model)
    assert (stopping.best_step, float(model.weight.detach())) == (2, 2.0)
    other = EarlyStopping(2)
    other.load_state_dict(stopping.state_dict())
    assert (other.over, other.best_step) == (True, 2)


def test_a_run_stops_early_with_its_best_model(quick, tmp_path, monkeypatch):
    measured = []

    def errors(model, examples, classes, **_):
        if len(examples) == 40:  # the validation set
            measured.append([p.detach().clone() for p in model.parameters()])
            return Errors([9.0, 8.0, 8.5, 8.0, 1.0][len(measured) - 1], 0.0, [0.0, 0.0])
        return Errors(1.0, 1.0, [1.0, 1.0])

    monkeypatch.setattr(loop, "measure_errors", errors)
    task = make_task(quick)
    config = replace(quick, steps=10, evaluations=5, early_stopping=2, validation=40 / len(task.train))
    run = train(config, tmp_path, progress=False)
    assert len(measured) == 4
    assert all(torch.equal(ours, best) for ours, best in zip(run.model.parameters(), measured[1], strict=True))
    assert read_metrics(tmp_path / "metrics.csv")["validation_error"] == [9.0, 8.0, 8.5, 8.0]
    stored = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(value, stored[name]) for name, value in run.model.state_dict().items())


@pytest.mark.parametrize("method", ["uniform", "l2rw", "mw-net"])
def test_bfloat16(quick, tmp_path, method):
    run = train(replace(quick, method=method, amp="bf16"), tmp_path, progress=False)
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert len(read_metrics(tmp_path / "metrics.csv")["loss"]) == 3


def test_tensorboard_that_is_not_installed_is_said(quick, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train(replace(quick, tensorboard=True), tmp_path, progress=False)


def test_tensorboard_has_the_rows(quick, tmp_path, monkeypatch):
    points, begun = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "tensorboard")
            begun.append(purge_step)

        def add_scalar(self, name, value, step):
            points.append((name, step))

        def flush(self):
            pass

        def close(self):
            points.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    train(replace(quick, tensorboard=True), tmp_path, progress=False)
    assert begun == [1]
    assert {step for name, step in points[:-1] if name == "test_error"} == {2, 4, 6}
    assert "validation_error" not in {name for name, _ in points[:-1]}
    assert points[-1] == "closed"


def test_a_failed_step_leaves_its_batch(quick, tmp_path, monkeypatch):
    def begin(setup):
        plain = find("uniform").begin(setup)

        def step(model, batch, meta_batch, *, optimizer, setting):
            if setting.step == 3:
                raise ValueError("the losses of examples [2] are not finite")
            return plain(model, batch, meta_batch, optimizer=optimizer, setting=setting)

        return step

    monkeypatch.setitem(METHODS, "failing", replace(find("uniform"), name="failing", begin=begin))
    with pytest.raises(ValueError, match=r"step 4: .* not finite; the batch is in .*failed_batch\.pt"):
        train(replace(quick, method="failing"), tmp_path, progress=False)
    stored = torch.load(tmp_path / "failed_batch.pt", weights_only=True)
    assert (stored["step"], stored["error"]) == (4, "the losses of examples [2] are not finite")
    task = make_task(quick)
    assert torch.equal(task.train.inputs[stored["rows"]], stored["batch"][0])
    monkeypatch.setitem(METHODS, "failing", find("uniform"))
    train(replace(quick, method="failing"), tmp_path, progress=False)
    assert not (tmp_path / "failed_batch.pt").exists()


@pytest.mark.parametrize("name", ["abacus", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there(quick, tmp_path, name):
    with pytest.raises(ValueError, match=f"--device {name} cannot be used here: "):
        train(replace(quick, device=name), tmp_path, progress=False)
