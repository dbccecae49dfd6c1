"""Products entry by entry: which of them keep gradients of single examples in place of what they read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.engines import pose
from metakern.engines.recorded import Recorded
from metakern.layers import per_example, scale
from metakern.testing.budget import assert_within
from metakern.testing.catalogue import SCALES, Case
from metakern.testing.catalogue.scales import Scaled
from metakern.testing.inputs import normal

LARGE = {"scale-large", "scale-flat"}


@pytest.mark.parametrize("case", SCALES, ids=lambda case: case.name)
def test_small_ones_let_go(case: Case) -> None:
    setup = case.make(5, 3)
    train = Recorded(pose(setup.model, setup.batch, setup.meta_batch, None, None, "reuse"))
    products = [r for r in train.records if r is not None and isinstance(r.call.func, per_example.Folded)]
    assert len(products) == (0 if case.name in LARGE else 2 if case.name == "scale-tied" else 1)
    assert all(record.call.func.rule is scale.RULE for record in products)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_are_of_float32_at_least(dtype: torch.dtype) -> None:
    """Where B and x are given numbers, dots_n = <g_n, V> with g_n = sum_t B_nt x_nt."""
    model = Scaled(6).to(dtype)
    x, b = (normal(5, 50, 6, seed=seed, dtype=dtype) for seed in (1, 2))
    meta_x, meta_b = (normal(3, 50, 6, seed=seed, dtype=dtype) for seed in (3, 4))

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) * batch[1]).sum((1, 2))

    dots = metakern.grad_dots(model, (x, b), (meta_x, meta_b), loss_fn=losses, engine="ghost").dots
    g, v = (x.double() * b.double()).sum(1), (meta_x.double() * meta_b.double()).sum(1).mean(0)
    assert_within(dots, g @ v, g.norm(dim=1) * v.norm(), dtype=dtype, terms=50)
