"""A pass keeps what it needs for another weighting, and nothing once it is over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metakern.engines import pose
from metakern.engines.recorded import InPassing, Recorded, recorded
from metakern.testing import budget, inputs


def opened(memory: str) -> Recorded | InPassing:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    return recorded(pose(model, batch, meta_batch, None, None, memory))


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_two_weightings_of_one_pass(memory: str) -> None:
    weights = torch.arange(5.0, dtype=torch.float64)
    train = opened(memory)
    first = train.weighted_gradient(weights, keep=True)
    second = train.weighted_gradient(2 * weights)
    for name, grad in first.items():
        budget.assert_within(second[name], 2 * grad, 1 + grad.abs(), name=name)


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_nothing_is_held_after_the_last(memory: str) -> None:
    train = opened(memory)
    train.weighted_gradient(torch.ones(5, dtype=torch.float64))
    assert train.trace.uses == ()
    assert not getattr(train, "records", [])
