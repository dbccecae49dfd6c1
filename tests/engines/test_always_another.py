"""Models of which every batch makes another graph: proofs that serve one batch each are given up."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.engines import choose
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

Batch = tuple[Tensor, list[bool]]


def branching(model: nn.Module, batch: Batch) -> Tensor:
    """A loss of its own for each example, by what it has: the graph tells which."""
    pairs = zip(model(batch[0]), batch[1], strict=True)
    return torch.stack([out.square().mean() if empty else F.softplus(out).mean() for out, empty in pairs])


def batch_of(k: int, n: int = 6) -> Batch:
    """The k-th mix of branches."""
    return inputs.pair(n, n, 4, classes=3, seed=k)[0][0], [bool(k >> place & 1) for place in range(n)]


def test_forward_mode_takes_over_and_gives_back() -> None:
    torch.manual_seed(0)
    model, meta = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), batch_of(63, 3)
    engines = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for k in range(choose._ALL_NEW + 3):
            rows = lambda batch, j: (batch[0][j : j + 1], batch[1][j : j + 1])  # noqa: E731
            setup = Setup(model, batch_of(k), meta, loss_fn=branching, select=rows)
            engines.append(judge_step(metakern.l2rw_step, setup).result.engine)
    assert engines == ["ghost"] * choose._ALL_NEW + ["jvp"] * 3
    assert ["made another graph" in str(one.message) for one in said] == [True]
    later = [
        metakern.l2rw_step(model, batch_of(0), meta, loss_fn=branching).engine for _ in range(choose._PASSED_BY + 3)
    ]
    assert later[-3:] == ["ghost"] * 3
    assert later.count("jvp") < choose._PASSED_BY


def test_one_that_was_asked_for_stays() -> None:
    model, meta = nn.Linear(4, 3).double(), batch_of(63, 3)
    for k in range(choose._ALL_NEW + 2):
        assert metakern.l2rw_step(model, batch_of(k), meta, loss_fn=branching, engine="ghost").engine == "ghost"


def test_structures_that_come_again_are_proved_once() -> None:
    model, meta = nn.Linear(4, 3).double(), batch_of(63, 3)
    for k in range(3 * choose._ALL_NEW):
        assert metakern.l2rw_step(model, batch_of(k // 2), meta, loss_fn=branching).engine == "ghost"
