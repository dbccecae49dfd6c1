"""Bags by look-up and addition, against torch's own, and in models that need forward mode."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.layers.forward.forms import twice_differentiable
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

TOKENS = torch.tensor([3, 1, 1, 0, 4, 2, 2, 0, 3])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    "keywords",
    [
        {"input": TOKENS.view(3, 3)},
        {"input": TOKENS.view(3, 3), "padding_idx": 0},
        {"input": TOKENS.view(3, 3), "padding_idx": -4},
        {"input": TOKENS, "offsets": torch.tensor([0, 2, 2, 6])},
        {"input": TOKENS, "offsets": torch.tensor([0, 0, 4, 9])},
        {"input": TOKENS, "offsets": torch.tensor([0, 3, 5, 9]), "include_last_offset": True, "padding_idx": 2},
        {"input": TOKENS.view(3, 3).int(), "per_sample_weights": inputs.normal(3, 3, seed=2)},
    ],
)
def test_same_values_and_gradient(mode: str, keywords: dict[str, Any]) -> None:
    if "per_sample_weights" in keywords and mode != "sum":
        pytest.skip("torch weights sums only")
    weight = inputs.normal(5, 4, seed=1).requires_grad_()
    given = F.embedding_bag(**keywords, weight=weight, mode=mode)
    with twice_differentiable():
        found = F.embedding_bag(**keywords, weight=weight, mode=mode)
    budget.assert_within(found, given, 10.0)
    cotangent = inputs.normal(*given.shape, seed=3)
    wanted, got = (torch.autograd.grad(out, weight, cotangent)[0] for out in (given, found))
    budget.assert_within(got, wanted, 10.0)


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.norm, self.head = nn.EmbeddingBag(7, 5, mode=mode), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.bag(tokens))))


@pytest.mark.parametrize("engine", ["jvp", "double_backward"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_with_batch_statistics(mode: str, engine: str) -> None:
    torch.manual_seed(0)
    batch, meta_batch = (
        (inputs.labels(n, 4, classes=7, seed=n), inputs.labels(n, classes=3, seed=n + 1)) for n in (6, 4)
    )
    setup = Setup(Bags(mode).double(), batch, meta_batch, interacting=True)
    judge_step(metakern.l2rw_step, setup, engine=engine)
