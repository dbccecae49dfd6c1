"""`allow_unused` in compiled and captured steps: as in the steps that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.step.programs.assumptions import Assumptions
from metakern.step.programs.captured import CapturedStep
from metakern.step.programs.own_batches import OwnBatches
from metakern.testing import inputs
from metakern.testing.judge import Snapshot
from tests.step.awkward import Dropped, TableOfLabels
from tests.step.virtual_reference import WeightNet, assert_same, close

FIELDS = ("weights", "labels", "dots", "tangents", "losses", "meta_loss")


def batches(seed: int = 0) -> Any:
    return inputs.pair(6, 3, 4, classes=3, seed=seed)


class HalfUsed(nn.Module):
    """A weight net or a label net with a layer that is never asked."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.idle = inner.double(), nn.Linear(2, 2).double()

    def forward(self, *given: Tensor) -> Tensor:
        return self.inner(*given)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


Steps = tuple[Callable[..., Any], Callable[..., Any], nn.Module]
"""Uncompiled, compiled, and the network beside the model."""


def l2rw(model: nn.Module, **settings: Any) -> Steps:
    return (
        partial(metakern.reweight_step, model, **settings),
        partial(metakern.compile_step, model, backend="eager", **settings),
        nn.Identity(),
    )


def mwnet(model: nn.Module, **settings: Any) -> Steps:
    torch.manual_seed(1)
    net = HalfUsed(WeightNet())
    given = {"weight_optimizer": optimizer_of(net), "virtual_lr": None, "virtual": "momentum", **settings}
    compiled = partial(metakern.compile_mwnet_step, model, net, backend="aot_eager", **given)
    return partial(metakern.mwnet_step, model, net, **given), compiled, net


def mlc(model: nn.Module, carries: bool = False, **settings: Any) -> Steps:
    net = HalfUsed(TableOfLabels())
    given = {"label_optimizer": optimizer_of(net), "virtual_lr": None, "virtual": "momentum", **settings}
    compiled = partial(metakern.compile_mlc_step, model, net, backend="aot_eager", carries=carries, **given)
    return partial(metakern.mlc_step, model, net, **given), compiled, net


KINDS: dict[str, Callable[..., Steps]] = {
    **{f"l2rw {engine}": partial(l2rw, engine=engine) for engine in ("ghost", "jvp")},
    **{f"mwnet {engine}": partial(mwnet, engine=engine) for engine in ("ghost", "jvp")},
    "mlc": mlc,
    "mlc fused": partial(mlc, fused=True),
    "mlc that carries": partial(mlc, carries=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_uncompiled(kind: str) -> None:
    """One layer takes part in the meta batch only, another in the train batch only, after steps with all of them."""
    runs = []
    for _ in range(2):
        model = Dropped()
        optimizer = optimizer_of(model)
        eager, compiled, net = KINDS[kind](model, optimizer=optimizer)
        model.dropped = 3
        eager(*batches())
        model.by_size = {6: 1, 3: 2}
        for p in (*model.layers[1].parameters(), *net.parameters()):
            p.grad = torch.ones_like(p)
        runs.append((model, net, optimizer, eager, compiled))
    (model, net, optimizer, _, compiled), (other, other_net, _, eager, _) = runs
    idle = [p.detach().clone() for p in model.layers[1].parameters()]
    before, before_net = Snapshot.of(model, optimizer), Snapshot.of(net)
    step = compiled(*batches(), allow_unused=True)
    before.assert_unchanged(model, optimizer)
    before_net.assert_unchanged(net)
    carries: list[Any] = [None, None]
    for seed in range(4):
        more = [{"accumulate": seed % 2 == 1} for _ in carries]
        if "carries" in kind:
            more = [{**m, "step_label_net": seed == 2, "carry": c} for m, c in zip(more, carries, strict=True)]
        got = step(*batches(seed), **more[0])
        want = eager(*batches(seed), allow_unused=True, **more[1])
        carries = [getattr(found, "carry", None) for found in (got, want)]
        for field in FIELDS:
            if hasattr(got, field):
                close(getattr(got, field), getattr(want, field), field, scale=4)
        assert_same(model, other, "model", scale=4)
        assert_same(net, other_net, "net", scale=4)
        if seed == 0:
            assert all(p.grad is None for p in model.layers[1].parameters())
            for p in (*model.layers[1].parameters(), *other.layers[1].parameters()):
                p.grad = torch.full_like(p, 0.0)  # which the optimizer's weight decay then meets
    assert any(p.grad is not None for p in model.layers[2].parameters())
    assert not all(torch.equal(p, q) for p, q in zip(model.layers[1].parameters(), idle, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_is_an_error_unless_allowed(kind: str) -> None:
    model = Dropped()
    _, compiled, net = KINDS[kind](model, optimizer=optimizer_of(model))
    before, before_net = Snapshot.of(model), Snapshot.of(net)
    with pytest.raises(ValueError, match=r"'layers\.1\.weight'.*did not take part.*allow_unused"):
        compiled(*batches())
    before.assert_unchanged(model)
    before_net.assert_unchanged(net)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_another_branch_uses_others(kind: str) -> None:
    """Which layer is dropped depends on the batch; the step of such a batch is taken uncompiled."""

    class ByValue(Dropped):
        def forward(self, x: Tensor) -> Tensor:
            dropped = 1 if bool(x[0, 0] < 100) else 2
            for k, layer in enumerate(self.layers):
                x = x if k == dropped else torch.tanh(layer(x))
            return self.head(x)

    runs, plain = [], {} if kind.startswith("l2rw") else {"virtual": "sgd"}
    for _ in range(2):
        model = ByValue()
        eager, compiled, net = KINDS[kind](model, optimizer=optimizer_of(model), **plain)
        runs.append((model, net, eager, compiled))
    (model, net, _, compiled), (other, other_net, eager, _) = runs
    step = compiled(*batches(), allow_unused=True)
    for large in (False, True, False):
        (x, y), meta_batch = batches(1)
        x[0, 0] = 1000.0 if large else 0.0
        step((x, y), meta_batch)
        eager((x, y), meta_batch, allow_unused=True)
        assert_same(model, other, "model", scale=3)
        assert_same(net, other_net, "net", scale=3)


def test_momentum_must_be_there_of_what_takes_part() -> None:
    model = Dropped()
    optimizer = optimizer_of(model)
    eager, compiled, _ = mwnet(model, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"no momentum of parameter 'layers\.0\.weight' yet"):
        compiled(*batches(), allow_unused=True)
    eager(*batches(), allow_unused=True)
    compiled(*batches(), allow_unused=True)(*batches())


def test_a_captured_step_leaves_no_gradient_either() -> None:
    """What was there goes, as in every step that replaces gradients."""
    model = Dropped()
    own = OwnBatches(batch=batches()[0], meta_batch=batches()[1])
    result = metakern.l2rw_step(model, *own.built(), allow_unused=True)
    gradient = {p: p.grad for p in model.parameters()}
    step = CapturedStep(
        lambda: None, own, gradient, result, lambda: Assumptions(model, None, "softmax", places=True), list
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step(*batches())
    for name, p in model.named_parameters():
        assert p.grad is gradient[p], name
    assert all(p.grad is None for p in model.layers[1].parameters())


@pytest.mark.gpu
def test_captured_as_uncaptured() -> None:
    runs = []
    for capture in (False, True):
        model = Dropped().cuda()
        optimizer = optimizer_of(model)
        first = [tuple(t.cuda() for t in batch) for batch in batches()]
        metakern.l2rw_step(model, *first, optimizer=optimizer, allow_unused=True)
        step = partial(metakern.l2rw_step, model, optimizer=optimizer, allow_unused=True)
        if capture:
            step = metakern.capture_step(model, *first, optimizer=optimizer, allow_unused=True)
        for seed in range(3):
            step(*[tuple(t.cuda() for t in batch) for batch in batches(seed)])
        runs.append(model)
    assert_same(runs[1], runs[0], "model", scale=3)
