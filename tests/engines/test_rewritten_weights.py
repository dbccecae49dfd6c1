"""Forward passes that rewrite weights: that of the train batch does, once; others and refused steps do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.judge import Snapshot, gradients


class Table(nn.Module):
    """Token embedding whose rows are kept within a norm, also where it is the head of the model."""

    def __init__(
        self, rewrite: Callable[[nn.Linear], None], normalised: bool, tied: bool, max_norm: float | None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.linear, self.head = nn.Embedding(7, 5, max_norm=max_norm), nn.Linear(5, 5), nn.Linear(5, 3)
        self.norm, self.tied, self.rewrite = nn.BatchNorm1d(5) if normalised else nn.Identity(), tied, rewrite
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        self.rewrite(self.linear)
        hidden = self.norm(torch.tanh(self.linear(self.table(tokens).mean(1))))
        if self.tied:
            hidden = hidden + (hidden @ self.table.weight.t()) @ self.table.weight
        return self.head(hidden)


def clamped(layer: nn.Linear) -> None:
    layer.weight.data.clamp_(-0.2, 0.2)


def shrunk(layer: nn.Linear) -> None:
    """Every pass goes on from the weights of the last one."""
    layer.weight.data.mul_(0.9)


def clamped_without_gradient(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.clamp_(-0.2, 0.2)


def replaced(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data / layer.weight.data.norm()


KINDS: dict[str, tuple[Callable[[nn.Linear], None], float | None]] = {
    "max-norm": (lambda layer: None, 1.0),
    **{function.__name__: (function, None) for function in (clamped, shrunk, clamped_without_gradient, replaced)},
}
BATCH, META = ((inputs.labels(n, 4, classes=7, seed=n), inputs.labels(n, classes=3, seed=n + 1)) for n in (5, 3))


def network(kind: str, normalised: bool, tied: bool = False) -> Table:
    rewrite, max_norm = KINDS[kind]
    return Table(rewrite, normalised, tied, max_norm)


def single_losses(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Dots and the gradient of the sum of the losses by plain backward passes, and the weights after the train pass."""
    parameters = dict(model.named_parameters())
    losses = F.cross_entropy(model(BATCH[0]), BATCH[1], reduction="none")
    rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    after = {name: p.detach().clone() for name, p in parameters.items()}
    v = torch.autograd.grad(F.cross_entropy(model(META[0]), META[1]), list(parameters.values()))
    dots = torch.stack([torch.stack([(g * d).sum() for g, d in zip(row, v, strict=True)]).sum() for row in rows])
    total = {name: torch.stack(column).sum(0) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)}
    return dots, total, after


@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward"])
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_exact(kind: str, normalised: bool, memory: str, engine: str) -> None:
    for tied in (False, True):
        model = network(kind, normalised, tied)
        dots, gradient, after = single_losses(network(kind, normalised, tied))
        result = metakern.reweight_step(model, BATCH, META, rule=torch.ones_like, engine=engine, memory=memory)
        budget.assert_within(result.dots, dots, 10.0)
        for name, p in model.named_parameters():
            budget.assert_within(p.detach(), after[name], 1.0, name=name)
            found = gradients(model)[name]
            assert found is not None
            budget.assert_within(found, gradient[name], 10.0, name=name)


@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dots_alone_change_nothing(kind: str, normalised: bool, engine: str) -> None:
    model = network(kind, normalised)
    before = Snapshot.of(model)
    metakern.grad_dots(model, BATCH, META, engine=engine)
    before.assert_unchanged(model)


def failing(dots: Tensor) -> Tensor:
    raise ArithmeticError


STEPS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "ghost": lambda model, net: metakern.l2rw_step(model, BATCH, META, engine="ghost"),
    "rule": lambda model, net: metakern.reweight_step(model, BATCH, META, rule=failing),
    "parts": lambda model, net: metakern.l2rw_step(model, BATCH, META, micro_batch=2),
    "weight-net": lambda model, net: metakern.mwnet_step(
        model, net, BATCH, META, weight_optimizer=None, virtual_lr=1e300
    ),
    "balance": lambda model, net: metakern.metabalance_step(model, BATCH, META, inner_lr=1e300),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_nothing_is_left_of_a_failed_step(step: str, kind: str) -> None:
    model, net = network(kind, normalised=True), nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
    before = Snapshot.of(model)
    with pytest.raises((ArithmeticError, NotImplementedError, ValueError)):
        STEPS[step](model, net)
    before.assert_unchanged(model)


def test_clamped_weights_stay_with_ghost() -> None:
    result = metakern.l2rw_step(network("clamped", normalised=False), BATCH, META)
    assert result.engine == "ghost"


@pytest.mark.parametrize("positional", [False, True])
def test_an_activation_in_place_on_the_batch(positional: bool) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            x = F.leaky_relu(x, 0.1, True) if positional else F.leaky_relu(x, 0.1, inplace=True)
            return self.linear(x)

    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    once = [F.leaky_relu(x, 0.1) for x, _ in (batch, meta_batch)]
    assert metakern.l2rw_step(First(), batch, meta_batch).engine == "ghost"
    for (found, _), want in zip((batch, meta_batch), once, strict=True):
        assert torch.equal(found, want)
