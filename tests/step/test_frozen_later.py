"""A parameter that is frozen between two steps stays where it is, as it does after `zero_grad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import metakern
from metakern.step.label_net import LabelNet
from metakern.testing import inputs

BATCH, META_BATCH = inputs.pair(8, 4, 5, classes=3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def weight_net() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()


def plain(model: nn.Module, **options: Any) -> Any:
    return metakern.l2rw_step(model, BATCH, META_BATCH, **options)


def weights(model: nn.Module, **options: Any) -> Any:
    net = weight_net()
    return metakern.mwnet_step(model, net, BATCH, META_BATCH, weight_optimizer=None, virtual_lr=0.1, **options)


def labels(model: nn.Module, **options: Any) -> Any:
    net = LabelNet(3, 0).double()
    return metakern.mlc_step(model, net, BATCH, META_BATCH, label_optimizer=None, virtual_lr=0.1, **options)


def balance(model: nn.Module, **options: Any) -> Any:
    return metakern.metabalance_step(model, BATCH, META_BATCH, inner_lr=0.1, **options)


def compiled(model: nn.Module, **options: Any) -> Any:
    accumulate = options.pop("accumulate", False)
    step = metakern.compile_step(model, BATCH, META_BATCH, backend="eager", **options)
    return step(BATCH, META_BATCH, accumulate=accumulate)


STEPS = [plain, weights, labels, balance, compiled]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("own", [True, False], ids=["optimizer inside", "optimizer outside"])
def test_a_frozen_layer_stays(step: Callable[..., Any], own: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    given = {"optimizer": optimizer} if own else {}
    step(model, **given)
    assert model[0].weight.grad is not None
    model[0].requires_grad_(requires_grad=False)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, **given)
    if not own:
        optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]


@pytest.mark.parametrize("step", STEPS)
def test_accumulation_keeps_what_was_there(step: Callable[..., Any]) -> None:
    model = network()
    step(model)
    model[0].requires_grad_(requires_grad=False)
    kept = model[0].weight.grad
    step(model, accumulate=True)
    assert model[0].weight.grad is kept


def test_a_failure_keeps_what_was_there() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("no step")

    model = network()
    plain(model)
    model[0].requires_grad_(requires_grad=False)
    kept = [p.grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no step"):
        plain(model, optimizer=Failing(model.parameters(), lr=0.1))
    assert all(p.grad is grad for p, grad in zip(model.parameters(), kept, strict=True))


def test_a_frozen_part_of_a_weight_net_stays() -> None:
    model, net = network(), weight_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=10.0)

    def step() -> None:
        metakern.mwnet_step(model, net, BATCH, META_BATCH, weight_optimizer=optimizer, virtual_lr=0.1)

    step()
    net[0].requires_grad_(requires_grad=False)
    before = [p.detach().clone() for p in net.parameters()]
    step()
    moved = [not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]
