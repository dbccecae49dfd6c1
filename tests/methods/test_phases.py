"""Early stopping and fine-tuning, and the rows of L2RW's table that are made of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakern.methods import Outcome, Setting, find
from metakern.methods.majority_weight import as_shipped_weights, swollen_class_weights
from metakern.methods.phases import EarlyStopped, FineTuned


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 2).double()


def run(step, model, task, steps, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    rows = torch.arange(12)
    batch, meta = (task.train.inputs[rows], task.train.targets[rows]), (task.meta.inputs, task.meta.targets)
    counts, generator = task.train.counts(2), torch.Generator().manual_seed(0)
    return [
        step(
            model,
            batch,
            meta,
            optimizer=optimizer,
            setting=Setting(counts, generator, indices=rows, step=k, steps=steps),
        )
        for k in range(steps)
    ]


def meta_loss(model, task) -> float:
    return F.cross_entropy(model(task.meta.inputs), task.meta.targets).item()


def test_early_stopping_gives_back_the_best(model, setup):
    task = setup(model).task
    seen = []

    def wander(model, batch, meta_batch, *, optimizer, setting):
        """Good after the third step, worse and worse from there."""
        with torch.no_grad():
            model.weight.zero_()
            model.bias.zero_()
            model.weight[1, 0] = 5.0 - abs(setting.step - 2) * 3
        optimizer.state["momentum"] = {}
        seen.append(copy.deepcopy(model.state_dict()))
        return Outcome(torch.ones(12), torch.ones(12), None)

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = EarlyStopped(wander, setup(model), checks=6)
    for k in range(6):
        setting = Setting(torch.ones(2), torch.Generator(), step=k, steps=6)
        step(model, (None, None), (None, None), optimizer=optimizer, setting=setting)
    assert all(torch.equal(value, seen[2][name]) for name, value in model.state_dict().items())
    assert not optimizer.state
    assert step.best == (0.0, pytest.approx(meta_loss(model, task)))


def test_early_stopping_goes_on_from_its_state(model, setup):
    plain = find("uniform").begin(setup(model))
    step = EarlyStopped(plain, setup(model), checks=5)
    run(step, model, setup(model).task, 10)
    other = EarlyStopped(plain, setup(model), checks=5)
    other.load_state_dict(step.state_dict())
    assert other.best == step.best
    assert other.kept.keys() == step.kept.keys()


def test_fine_tuning_leaves_the_training_batch_out(model, setup):
    task = setup(model).task
    told = []

    def inner(model, batch, meta_batch, *, optimizer, setting):
        told.append((setting.step, setting.steps))
        return Outcome(torch.ones(12), torch.ones(12), None)

    plain = copy.deepcopy(model)
    outcomes = run(FineTuned(inner, 0.3), model, task, 10)
    assert told == [(k, 7) for k in range(7)]
    assert all(not outcome.weights.any() for outcome in outcomes[7:])
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(task.meta.inputs), task.meta.targets).backward()
        optimizer.step()
    torch.testing.assert_close(model.weight, plain.weight)


def test_both_phases_in_order(model, setup):
    step = find("uniform-es-ft").begin(setup(model, steps=34))
    assert isinstance(step, FineTuned)
    assert isinstance(step.inner, EarlyStopped)
    before = meta_loss(model, setup(model).task)
    outcomes = run(step, model, setup(model).task, 34)
    assert [bool(outcome.weights.any()) for outcome in outcomes] == [True] * 32 + [False] * 2
    assert meta_loss(model, setup(model).task) < before


def counts(*numbers: int) -> Setting:
    return Setting(torch.tensor(numbers), torch.Generator())


def test_weighted_by_hand():
    # Class 1 has 6 of 10 labels: 1/2 over 0.6.
    weights = swollen_class_weights(torch.zeros(3), torch.tensor([0, 1, 1]), counts(4, 6))
    factor = 0.5 / 0.6
    assert weights.tolist() == pytest.approx([x / (1 + 2 * factor) for x in (1, factor, factor)])


def test_weighted_as_shipped_goes_by_the_batch_and_by_one_noise():
    factor = 0.1 / (0.4 + 0.6 / 2)
    weights = as_shipped_weights(torch.zeros(3), torch.tensor([0, 0, 1]), counts(4, 6))
    assert weights.tolist() == pytest.approx([x / (1 + 2 * factor) for x in (factor, factor, 1)])
    hundred = as_shipped_weights(torch.zeros(2), torch.tensor([3, 5]), counts(*[1] * 100))
    assert (hundred[0] / hundred[1]).item() == pytest.approx(0.1 / 0.406)  # a true share of 0.01 would give 0.0246


def test_clean_only_trains_on_the_meta_set(setup, model):
    task = setup(model).task
    clean = find("clean-only").training_set(task, 0)
    assert torch.equal(clean.train.ids, task.meta.ids)
    assert torch.equal(clean.clean_targets, clean.train.targets)
