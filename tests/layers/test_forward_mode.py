"""The dual level in which tangents are computed, where torch's own forward mode falls short."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import metakern
from metakern.layers.forward_mode import dual_level
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, judge_step


def test_group_norm_of_channels_last() -> None:
    x, tangent, weight = inputs.normal(3, 8, 5, 5, seed=1), inputs.normal(3, 8, 5, 5, seed=2), inputs.normal(8, seed=3)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for call in (F.group_norm, torch.group_norm, partial(torch.group_norm, cudnn_enabled=False)):
            for named in (False, True):
                with dual_level():
                    dual = forward_ad.make_dual(*(value.to(memory_format=layout) for value in (x, tangent)))
                    out = call(num_groups=4, weight=weight, input=dual) if named else call(dual, 4, weight)
                    found.append(forward_ad.unpack_dual(out).tangent)
    for other in found[1:]:
        budget.assert_within(other, found[0], 10.0)


def test_logit_tangents_of_a_channels_last_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).double()
    batch, meta_batch = ((inputs.normal(n, 3, 6, 6, seed=n), inputs.labels(n, classes=4, seed=n + 1)) for n in (6, 4))
    plain = metakern.logit_tangents(model, batch, meta_batch)
    turned = metakern.logit_tangents(model.to(memory_format=torch.channels_last), batch, meta_batch)
    budget.assert_within(turned.tangents, plain.tangents, 100.0)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_normalisation_beneath_batch_normalisation(dim: int | None) -> None:
    torch.manual_seed(0)
    layers = weight_norm(nn.Linear(4, 5), dim=dim), nn.BatchNorm1d(5), nn.Tanh(), weight_norm(nn.Linear(5, 3), dim=dim)
    setup = Setup(nn.Sequential(*layers).double(), *inputs.pair(6, 4, 4, classes=3), interacting=True)
    judge_step(metakern.l2rw_step, setup)


@torch.library.custom_op("metakern_test::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """x * weight as an operator whose derivative is written in Python: forward mode would lose its tangent."""
    return x * weight


def _scaled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return grad * weight, (grad * x).sum(0)


scaled.register_autograd(_scaled_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Scaled(nn.Module):
    """The operator, or a branch of torch.cond, between two layers."""

    def __init__(self, norm: nn.Module, branches: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 5), norm, nn.Linear(5, 3)
        self.weight, self.branches = nn.Parameter(torch.linspace(0.5, 1.5, 5)), branches

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        if self.branches:
            return self.head(
                torch.cond(torch.tensor(True), lambda h: (h.tanh(),), lambda h: (h.relu(),), (hidden * self.weight,))[0]
            )
        return self.head(hidden + scaled(hidden, self.weight))


def scaled_setup(model: nn.Module) -> Setup:
    torch.manual_seed(0)
    return Setup(model.double(), *inputs.pair(6, 4, 4, classes=3), interacting=True)


def test_custom_operator_on_a_parameter() -> None:
    assert judge_step(metakern.l2rw_step, scaled_setup(Scaled(nn.LayerNorm(5)))).result.engine == "ghost"


def test_custom_operator_has_no_forward_mode() -> None:
    setup = scaled_setup(Scaled(nn.BatchNorm1d(5)))
    refused(setup, "auto", r"operator .* has no forward mode")
    judge_step(metakern.l2rw_step, setup, engine="double_backward")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_branches_that_are_operators() -> None:
    """Neither tangents nor second derivatives come out of torch.cond, and torch does not say so."""
    judge_step(metakern.l2rw_step, scaled_setup(Scaled(nn.LayerNorm(5), branches=True)), engine="ghost")
    setup = scaled_setup(Scaled(nn.BatchNorm1d(5), branches=True))
    refused(setup, "auto", r"operator cond has no forward mode")
    refused(setup, "double_backward", r"operator cond cannot be differentiated again")
    with pytest.raises(NotImplementedError, match=r"operator cond cannot be differentiated again"):
        metakern.metabalance_step(setup.model, setup.batch, setup.meta_batch, inner_lr=0.1)


def refused(setup: Setup, engine: str, message: str) -> None:
    before = Snapshot.of(setup.model)
    with pytest.raises(NotImplementedError, match=message):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine=engine)
    before.assert_unchanged(setup.model)
