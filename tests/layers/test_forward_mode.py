"""The dual level in which tangents are computed, where torch's own forward mode falls short."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import metakern
from metakern.layers.forward_mode import dual_level
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step


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
