"""Normalisation: what a call leaves to defaults is what torch takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import metakern
from metakern.testing.budget import assert_within
from metakern.testing.catalogue.case import Setup
from metakern.testing.inputs import labels, normal, pair
from metakern.testing.judge import judge_step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_without_eps_on_inputs_as_small_as_eps(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.RMSNorm(6), torch.nn.Flatten(), torch.nn.Linear(12, 3)).to(dtype)
    model[2].requires_grad_(False)
    x, y = 1e-4 * normal(4, 2, 6, dtype=dtype), labels(4, classes=3)
    dots = metakern.grad_dots(model, (x, y), (x[:2], y[:2]), engine="ghost").dots
    wide = model.double()
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    weight = wide[0].weight.detach().requires_grad_()
    losses = F.cross_entropy(wide[2](F.rms_norm(x.double(), (6,), weight, eps).flatten(1)), y, reduction="none")
    g = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses])
    v = g[:2].mean(0)
    assert_within(dots, g @ v, g.norm(dim=1) * v.norm(), dtype=dtype, terms=12)


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm1d, torch.nn.InstanceNorm1d])
def test_running_statistics_in_half_precision(norm: type[torch.nn.BatchNorm1d]) -> None:
    """They normalise activations that are taken in float32."""
    torch.manual_seed(0)
    body = torch.nn.Conv1d(2, 4, 2), norm(4, affine=True, track_running_stats=True), torch.nn.Tanh()
    model = torch.nn.Sequential(*body, torch.nn.Flatten(), torch.nn.Linear(16, 3)).bfloat16().eval()
    setup = Setup(model, *pair(6, 3, 2, 5, classes=3, dtype=torch.bfloat16))
    judge_step(metakern.l2rw_step, setup, engine="ghost", plain=setup.oracle(dtype=torch.bfloat16))
