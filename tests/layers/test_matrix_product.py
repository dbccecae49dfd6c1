"""Products with a bare matrix: every function that makes them, what is trained of them, where the rule stands back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "@": lambda x, w, b: x @ w + b,
    "matmul": lambda x, w, b: torch.matmul(x, other=w) + b,
    "method": lambda x, w, b: x.matmul(w) + b,
    "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w).view(*x.shape[:-1], -1) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).view(*x.shape[:-1], -1),
    "time first": lambda x, w, b: (x.transpose(0, 1) @ w + b).transpose(0, 1),
    "a residual": lambda x, w, b: torch.addmm(x.flatten(0, 1)[:, :5], x.flatten(0, 1), w).view(*x.shape[:-1], -1) + b,
}
UNSERVED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "scaled": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w, alpha=0.5).view(*x.shape[:-1], -1),
    "weight first": lambda x, w, b: (w.t() @ x.transpose(1, 2)).transpose(1, 2) + b,
    "a square": lambda x, w, b: x @ (w @ w.t()) @ w + b,
}


class Network(nn.Module):
    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor], tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.product, self.tied = product, tied
        self.first, self.last = nn.Linear(4, 6), nn.Linear(5, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.product(self.first(x).tanh(), self.weight, self.bias).tanh()
        if self.tied:
            h = self.product(F.linear(h, self.weight), self.weight, self.bias)
        return self.last(h).mean(1)


def setup(model: nn.Module) -> Setup:
    return Setup(model.double(), *inputs.pair(6, 3, 7, 4, classes=3))


def rules(given: Setup) -> set[str]:
    uses = metakern.explain(given.model, given.batch, given.meta_batch).uses
    return {use.rule for use in uses if use.parameters.startswith(("weight", "bias, weight"))}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_is_exact_by_its_rule(name: str, tied: bool) -> None:
    given = setup(Network(PRODUCTS[name], tied))
    judge_step(metakern.l2rw_step, given)
    assert "matrix_product" in rules(given)
    assert "generic" not in rules(given)


@pytest.mark.parametrize("name", UNSERVED)
def test_is_exact_where_the_rule_stands_back(name: str) -> None:
    judge_step(metakern.l2rw_step, setup(Network(UNSERVED[name])))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_parts_may_be_frozen(name: str, frozen: str) -> None:
    model = Network(PRODUCTS[name])
    model.get_parameter(frozen).requires_grad_(False)
    judge_step(metakern.l2rw_step, setup(model))


@pytest.mark.parametrize("name", PRODUCTS)
def test_virtual_steps_and_single_rows(name: str) -> None:
    """A folded pass, and a meta batch of one example."""
    model = Network(PRODUCTS[name]).double()
    batch, meta_batch = inputs.pair(5, 1, 7, 4, classes=3)
    net = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
    found = []
    for engine in ("ghost", "double_backward"):
        metakern.mwnet_step(model, net, batch, meta_batch, weight_optimizer=None, virtual_lr=0.1, engine=engine)
        found.append([p.grad for p in (*model.parameters(), *net.parameters())])
    for got, want in zip(*found, strict=True):
        assert got is not None
        assert want is not None
        budget.assert_within(got, want, 1 + want.abs(), dtype=torch.float64, terms=100)
