"""Whatever the optimizer of a weight net keeps, a failed step leaves it as it was."""

from typing import Any

import pytest
import torch
from torch import nn

import metakern
from metakern.testing import inputs
from metakern.testing.judge import Snapshot


class Counting(torch.optim.Optimizer):
    """Keeps numbers, tensors and lists both in its groups, as schedule-free optimizers and Prodigy do, and its state.

    It steps with the average of all gradients so far.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"k": 0, "lr": torch.tensor(0.1), "total": torch.zeros(()), "norms": []})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["total"] += 1
            group["lr"] *= 0.5
            for p in group["params"]:
                group["norms"].append(float(p.grad.norm()))
                kept = self.state[p].setdefault("gradients", [])
                kept.append(p.grad.clone())
                p -= group["lr"] * sum(kept) / group["k"]


class Failing(torch.optim.SGD):
    fails = True

    def step(self, closure: Any = None) -> None:
        if self.fails:
            raise OSError("no step today")
        super().step()


def test_a_failed_step_leaves_the_optimizer_of_the_weight_net() -> None:
    torch.manual_seed(0)
    model, net = nn.Linear(4, 3).double(), nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
    optimizer, own = Failing(model.parameters(), lr=0.1), Counting(net.parameters())
    batch, meta = inputs.pair(5, 3, 4, classes=3)

    def step() -> None:
        metakern.mwnet_step(model, net, batch, meta, weight_optimizer=own, virtual_lr=0.1, optimizer=optimizer)

    optimizer.fails = False
    step()
    optimizer.fails = True
    before = Snapshot.of(net, own)
    with pytest.raises(OSError, match="no step today"):
        step()
    before.assert_unchanged(net, own)
    assert [id(p) for p in own.param_groups[0]["params"]] == [id(p) for p in net.parameters()]
