"""Dots along other directions than the meta gradient, against the products written out."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.step.direction import preconditioned, with_weight_decay
from metakern.testing import inputs
from metakern.testing.judge import Snapshot
from tests.step.virtual_reference import MODELS, Batch, close, losses_at, make

ENGINES = ["auto", "jvp", "double_backward"]


def example_gradients(model: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    parameters = dict(model.named_parameters())
    losses = losses_at(model, parameters, batch)
    return [
        dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), retain_graph=True), strict=True))
        for loss in losses
    ]


def meta_gradient(model: nn.Module, meta_batch: Batch) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    loss = losses_at(model, parameters, meta_batch).mean()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def products(model: nn.Module, batch: Batch, v: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(
        [torch.stack([(g[name] * v[name]).sum() for name in v]).sum() for g in example_gradients(model, batch)]
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_weight_decay(name: str, engine: str) -> None:
    model, batch, meta_batch = make(name)
    v = {key: g + 0.3 * dict(model.named_parameters())[key] for key, g in meta_gradient(model, meta_batch).items()}
    want = products(model, batch, v)
    got = metakern.reweight_step(model, batch, meta_batch, direction=with_weight_decay(model, 0.3), engine=engine)
    close(got.dots, want, "dots")
    kept = want.clamp(min=0)
    close(got.weights, kept / kept.sum(), "weights")


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.shared, self.train_only = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor, both: bool) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.shared(hidden) + self.train_only(hidden) if both else self.shared(hidden)


@pytest.mark.parametrize(
    ("engine", "micro_batch"), [("ghost", None), ("ghost", 2), ("jvp", None), ("double_backward", None)]
)
def test_weight_decay_of_what_the_meta_loss_does_not_depend_on(engine: str, micro_batch: int | None) -> None:
    model, (batch, meta_batch) = TwoHeads(), inputs.pair(5, 3, 4, classes=3)

    def losses(model: nn.Module, given: Any) -> Tensor:
        (x, targets), both = given
        return F.cross_entropy(model(x, both), targets, reduction="none")

    def reached(given: Any) -> list[dict[str, Tensor]]:
        parameters = dict(model.named_parameters())
        found = [
            torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
            for loss in losses(model, given)
        ]
        return [{name: g for name, g in zip(parameters, one) if g is not None} for one in found]

    v = {name: 0.3 * p.detach() for name, p in model.named_parameters()}
    for one in reached((meta_batch, False)):
        v |= {name: v[name] + g / 3 for name, g in one.items()}
    want = torch.stack([torch.stack([(g[name] * v[name]).sum() for name in g]).sum() for g in reached((batch, True))])
    got = metakern.reweight_step(
        model,
        (batch, True),
        (meta_batch, False),
        loss_fn=losses,
        direction=with_weight_decay(model, 0.3),
        engine=engine,
        micro_batch=micro_batch,
    )
    close(got.dots, want, "dots")


@pytest.mark.parametrize("name", MODELS)
def test_preconditioned(name: str) -> None:
    """After two steps of Adam the direction is divided by what the third step would divide by at gradient zero."""
    model, batch, meta_batch = make(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    v = {}
    for key, g in meta_gradient(model, meta_batch).items():
        second = optimizer.state[dict(model.named_parameters())[key]]["exp_avg_sq"]
        root = (0.9 * second / (1 - 0.9**3)).sqrt() + 1e-4
        v[key] = 0.01 * (1 - 0.8) / (1 - 0.8**3) * g / root
    want = products(model, batch, v)
    got = metakern.reweight_step(model, batch, meta_batch, direction=preconditioned(model, optimizer))
    close(got.dots, want, "dots")


def test_nothing_changes_without_a_direction() -> None:
    """The meta gradient itself, handed through, gives what the shorter way gives."""
    model, batch, meta_batch = make("transformer")
    through = metakern.reweight_step(model, batch, meta_batch, direction=lambda v: v)
    close(through.dots, metakern.reweight_step(model, batch, meta_batch).dots, "dots")


def test_arguments() -> None:
    model, batch, meta_batch = make("mlp")
    before = Snapshot.of(model)
    direction: Any
    for direction, error, match in (
        (lambda v: 3, TypeError, "direction must return a mapping.*int"),
        (lambda v: {"head": torch.ones(3)}, ValueError, "'head', which is not among the parameters"),
        (lambda v: {"4.bias": torch.ones(2)}, ValueError, r"\(2,\) for '4.bias', expected.*\(3,\)"),
    ):
        with pytest.raises(error, match=match):
            metakern.reweight_step(model, batch, meta_batch, direction=direction)
        before.assert_unchanged(model)
    with pytest.raises(TypeError, match="must be Adam or AdamW; got SGD"):
        preconditioned(model, torch.optim.SGD(model.parameters(), lr=0.1))
