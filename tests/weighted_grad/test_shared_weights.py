"""A weight that is used several times: each further use adds to the others inside its product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern import ops
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step


class Recurrent(nn.Module):
    """Three steps of a recurrent network whose weight is that of the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = x.unbind(1)
        state = torch.tanh(self.into(first))
        for step in others:
            state = torch.tanh(self.into(step) + self.again(state))
        return nn.functional.linear(state, self.again.weight)


def test_further_uses_add_within_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[bool] = []
    operator = ops.weighted_grad

    def watched(*operands: Tensor, start: Tensor | None, **settings: bool) -> tuple[Tensor, Tensor]:
        starts.append(start is not None)
        return operator(*operands, start=start, **settings)

    monkeypatch.setattr(ops, "weighted_grad", watched)
    torch.manual_seed(0)
    model = Recurrent().double()
    setup = Setup(model, *inputs.pair(5, 3, 3, 4, classes=5))
    metakern.l2rw_step(model, setup.batch, setup.meta_batch, engine="ghost")
    assert sorted(starts) == [False] * 2 + [True] * 4
    judge_step(metakern.l2rw_step, setup, engine="ghost")


def test_uses_of_two_dtypes_are_added_afterwards() -> None:
    """Under autocast one use is in bfloat16; the other, in float32, keeps its digits."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                low = self.layer(x)
            return self.layer(low.float())

    torch.manual_seed(0)
    model = Mixed()
    batch, meta_batch = inputs.pair(5, 3, 4, classes=4, dtype=torch.float32)
    result = metakern.l2rw_step(model, batch, meta_batch, engine="ghost")
    losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    wanted = torch.autograd.grad((result.weights * losses).sum(), list(model.parameters()))
    for p, want in zip(model.parameters(), wanted, strict=True):
        assert p.grad is not None
        budget.assert_within(p.grad, want, want.abs().max(), dtype=torch.bfloat16, terms=20)
