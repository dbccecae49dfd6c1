import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakern.methods import Setting, find
from metakern.methods.class_weights import by_class, inverse_frequency
from metakern.methods.sharpness import mixed_up

COUNTS = torch.tensor([30, 70])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return inputs, (torch.rand(12, generator=generator) < 0.7).long()


@pytest.mark.parametrize("name", ["sam", "sam-a"])
def test_sam_by_its_definition(name, model, batch, setup):
    inputs, targets = batch
    plain = copy.deepcopy(model)
    weights = by_class(inverse_frequency(COUNTS).double(), targets) if name == "sam-a" else torch.full((12,), 1 / 12)
    parameters = list(plain.parameters())
    up = torch.autograd.grad((weights * F.cross_entropy(plain(inputs), targets, reduction="none")).sum(), parameters)
    length = torch.sqrt(sum(g.square().sum() for g in up))
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, up, strict=True):
            p += 0.05 * g / length
    gradient = torch.autograd.grad(F.cross_entropy(plain(inputs), targets), parameters)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = find(name).begin(setup(model))
    step(model, batch, batch, optimizer=optimizer, setting=Setting(COUNTS, torch.Generator()))
    for ours, old, g in zip(model.parameters(), start, gradient, strict=True):
        torch.testing.assert_close(ours.detach(), old - 0.1 * g)


def test_mixup_by_hand():
    inputs = torch.arange(8.0).view(4, 2)
    mixed, partners, share = mixed_up(inputs, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed, share * inputs + (1 - share) * inputs[partners])
    assert sorted(partners.tolist()) == [0, 1, 2, 3]
    shares = [mixed_up(inputs, torch.Generator().manual_seed(k))[2] for k in range(200)]
    assert 0.4 < sum(shares) / 200 < 0.6
    with pytest.raises(ValueError, match="mixup needs inputs that are numbers"):
        mixed_up(torch.zeros(3, 2, dtype=torch.int64), torch.Generator())
