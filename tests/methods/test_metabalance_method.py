"""MetaBalance as a method: the mean of its pairs against double backward, its pools, and its state."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakern.data import Examples, Task
from metakern.methods import Setting, find
from metakern.methods.metabalance import SAMPLERS, BalanceSettings, BalanceStep, InnerTask, Stream, find_pools
from metakern.testing import budget


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


@pytest.fixture
def task() -> Task:
    """60 training examples of 6 numbers, eight of them of class 0."""
    generator = torch.Generator().manual_seed(2)
    targets = (torch.arange(60) >= 8).long()
    inputs = torch.randn(60, 6, generator=generator, dtype=torch.float64) + targets.unsqueeze(1)
    train = Examples(inputs, targets, torch.arange(60))
    return Task("made-up", train, train, train, ("a", "b"), targets)


def setting_of() -> Setting:
    return Setting(torch.tensor([8, 52]), torch.Generator())


@pytest.mark.parametrize("order", [1, 2])
def test_a_step_is_the_mean_of_its_pairs(model, setup, task, order):
    settings = BalanceSettings(outer="oversample", order=order, inner_lr=0.3)
    step = BalanceStep(setup(model, task=task), settings)
    rows = torch.arange(0, 60)[:31]  # a part of 16 and one of 15, not 24 and 7
    stream, parameters = Stream(len(step.outer), 7), list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    total = [torch.zeros_like(p) for p in parameters]
    for piece in (rows[:16], rows[16:]):
        outer = stream.take(16)
        loss = F.cross_entropy(model(task.train.inputs[piece]), task.train.targets[piece])
        inner = torch.autograd.grad(loss, parameters, create_graph=order == 2)
        moved = {name: p - 0.3 * g for name, p, g in zip(names, parameters, inner)}
        logits = torch.func.functional_call(model, moved, step.outer.inputs[outer])
        found = torch.autograd.grad(F.cross_entropy(logits, step.outer.targets[outer]), parameters)
        share = len(piece) / 31
        total = [t + share * (g + 0.01 * i.detach()) for t, g, i in zip(total, found, inner)]
    before = copy.deepcopy(model)
    batch = task.train.inputs[rows], task.train.targets[rows]
    outcome = step(model, batch, batch, optimizer=torch.optim.SGD(model.parameters(), 1.0), setting=setting_of())
    for p, old, g in zip(model.parameters(), before.parameters(), total):
        budget.assert_within(p.detach(), (old - g).detach(), 1.0, terms=1000)
    losses = F.cross_entropy(before(batch[0]), batch[1], reduction="none").detach()
    budget.assert_within(outcome.losses.mean(), losses.mean(), 1.0, terms=1000)
    assert outcome.weights.tolist() == [1 / 31] * 31


def test_pools(setup, model, task):
    assert SAMPLERS["raw"](task, 0) is task
    smote = BalanceStep(setup(model, task=task), BalanceSettings())
    assert smote.outer.counts(2).tolist() == [52, 52]
    method = find("metabalance-oversample-undersample")
    inner = method.training_set(task, 0)
    assert isinstance(inner, InnerTask)
    assert inner.train.counts(2).tolist() == [52, 52]
    # The outer pool is made from the examples as they were given, not from the inner pool.
    assert method.begin(setup(model, task=inner)).outer.counts(2).tolist() == [8, 8]
    assert find_pools("metabalance-smote-enn-smote").name == "metabalance-smote-enn-smote"
    assert find_pools("metabalance-smote-none") is None
    with pytest.raises(ValueError, match="unknown method 'metabalance-smote-none'"):
        find("metabalance-smote-none")


def test_a_stream_has_every_row_before_any_comes_again():
    stream = Stream(10, 0)
    rows = torch.cat([stream.take(4) for _ in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert len(stream.take(16)) == 10


def test_the_stream_is_part_of_the_state(setup, model, task):
    first, second = (BalanceStep(setup(model, task=task), BalanceSettings(outer="raw")) for _ in range(2))
    first._stream.take(7)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(9):
        assert torch.equal(first._stream.take(16), second._stream.take(16))


def test_tokens_are_refused(setup, model):
    tokens = Examples(torch.ones(4, 3, dtype=torch.int64), torch.tensor([0, 1, 0, 1]), torch.arange(4))
    text = Task("text", tokens, tokens, tokens, ("a", "b"), tokens.targets)
    with pytest.raises(ValueError, match=r"int64 tokens, which only .* and metabalance-raw-oversample take"):
        find("metabalance").begin(setup(model, task=text))
    assert find("metabalance-raw-oversample").begin(setup(model, task=text)).outer.inputs.dtype == torch.int64
