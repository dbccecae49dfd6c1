"""Embeddings whose gradient is sparse: no engine may mind."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.oracle import clip_normalise


class Tokens(nn.Module):
    def __init__(self, tied: bool, normalised: bool, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(7, 4, sparse=True, **settings), nn.Linear(4, 7)
        if tied:
            self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(4) if normalised else nn.Identity()
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.embedding(tokens).mean(1))))


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("tied", "settings"), [(False, {}), (True, {}), (False, {"max_norm": 0.5})])
def test_exact(tied: bool, settings: dict[str, Any], normalised: bool, memory: str) -> None:
    _assert_exact(Tokens(tied, normalised, **settings), memory)


class Bags(Tokens):
    def __init__(self, mode: str) -> None:
        super().__init__(tied=False, normalised=False)
        self.embedding = nn.EmbeddingBag(7, 4, sparse=True, mode=mode).double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags(mode: str, memory: str) -> None:
    _assert_exact(Bags(mode), memory)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    return ((inputs.labels(n, 3, classes=7, seed=n), inputs.labels(n, classes=7, seed=n + 1)) for n in (5, 3))


@pytest.mark.parametrize("virtual", ["sgd", "momentum"])
@pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
@pytest.mark.parametrize("bag", [False, True])
def test_steps_of_a_weight_net(bag: bool, engine: str, virtual: str) -> None:
    """A virtual step with a sparse gradient is that of the same table with a dense one."""
    steps = []
    for sparse in (True, False):
        model = Bags("mean") if bag else Tokens(tied=False, normalised=False)
        model.embedding.sparse = sparse
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        settings: dict[str, Any] = dict(weight_optimizer=torch.optim.SGD(net.parameters(), 0.1), virtual_lr=0.1)
        for _ in range(2):
            result = metakern.mwnet_step(
                model, net, *batches(), optimizer=optimizer, engine=engine, virtual=virtual, **settings
            )
        steps.append((result.dots, *model.parameters(), *net.parameters()))
    for got, want in zip(*steps, strict=True):
        budget.assert_within(got, want, 1 + want.abs())


@pytest.mark.parametrize("first", ["reuse", "two_pass"])
@pytest.mark.parametrize("second", ["reuse", "two_pass"])
def test_accumulates(first: str, second: str) -> None:
    """Kept records give a dense gradient, a backward pass gives a sparse one."""
    model = Tokens(tied=False, normalised=False)
    metakern.l2rw_step(model, *batches(), memory=first)
    once = [p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None]
    metakern.l2rw_step(model, *batches(), memory=second, accumulate=True)
    for p, grad in zip(model.parameters(), once, strict=True):
        assert p.grad is not None
        budget.assert_within(p.grad.to_dense(), 2 * grad, 1 + grad.abs())


def _assert_exact(model: nn.Module, memory: str) -> None:
    batch, meta_batch = batches()
    truth = Setup(model, batch, meta_batch, interacting=True).oracle()
    result = metakern.l2rw_step(model, batch, meta_batch, memory=memory)
    budget.assert_dots(result.dots, truth)
    budget.assert_within(result.weights, clip_normalise(result.dots), 1.0)
    found = {name: None if p.grad is None else p.grad.to_dense() for name, p in model.named_parameters()}
    budget.assert_gradient(found, truth, weights=result.weights)
