"""The small transformer: padding does not count, the ghost engine serves it, the command line has it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import metakern
from metakern.data import Examples, Task
from metakern.methods.features import features
from metakern.trainers import task as tasks
from metakern.trainers import train
from metakern.trainers.networks import network_for
from metakern.trainers.transformer import Transformer


def texts(n: int = 12, *, length: int = 7, classes: int = 3) -> Task:
    """Texts of different lengths whose class is their first token's remainder."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 20, (n, length), generator=generator)
    ends = torch.randint(2, length + 1, (n, 1), generator=generator)
    tokens = torch.where(torch.arange(length) < ends, tokens, 0)
    examples = Examples(tokens, tokens[:, 0] % classes, torch.arange(n))
    return Task("texts", examples, examples, examples, tuple("abcdefg"[:classes]), examples.targets)


@pytest.fixture
def model() -> Transformer:
    return network_for(texts(), 0, "transformer").eval()


def test_seed_decides_the_parameters(model):
    again, other = (network_for(texts(), seed, "transformer") for seed in (0, 1))
    assert torch.equal(model.head.weight, again.head.weight)
    assert not torch.equal(model.head.weight, other.head.weight)


def test_padding_does_not_count(model):
    tokens = torch.tensor([[3, 4, 5, 0, 0, 0, 0]])
    torch.testing.assert_close(model(tokens), model(tokens[:, :3]))
    assert torch.isfinite(model(torch.zeros(1, 7, dtype=torch.int64))).all()


def test_features_are_the_mean_over_the_tokens(model):
    task = texts()
    found = features(model, task.train.inputs)
    assert found.shape == (12, 64)
    torch.testing.assert_close(model.head(found), model(task.train.inputs))


def test_ghost_dots_are_those_of_single_losses(model):
    task, model = texts(), model.double()
    batch = task.train.inputs, task.train.targets
    meta = task.train.inputs[:3], task.train.targets[:3]
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(F.cross_entropy(model(meta[0]), meta[1]), parameters)
    expected = []
    for n in range(12):
        loss = F.cross_entropy(model(batch[0][n : n + 1]), batch[1][n : n + 1])
        gradient = torch.autograd.grad(loss, parameters)
        expected.append(sum((g * v).sum() for g, v in zip(gradient, wanted, strict=True)))
    result = metakern.grad_dots(model, batch, meta, engine="ghost")
    torch.testing.assert_close(result.dots, torch.stack(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["uniform", "mlrnet"])
def test_a_run_learns(quick, tmp_path, monkeypatch, method):
    monkeypatch.setattr("metakern.trainers.loop.make_task", lambda config: texts(60))
    config = replace(quick, method=method, data="ag-news", majority=None, model="transformer", steps=60)
    run = train(replace(config, optimizer="adam", lr=3e-3, meta_batch_size=20), tmp_path, progress=False)
    assert run.errors.test < 30


def test_names_and_inputs_are_checked(quick):
    with pytest.raises(ValueError, match=r"unknown --model 'bert'; there are: .*transformer, transformers:DIR"):
        network_for(texts(), 0, "bert")
    with pytest.raises(ValueError, match=r"takes tokens \[n, t\] int64, got torch.float32"):
        network_for(tasks.make_task(quick), 0, "transformer")
