"""Calls that take parameters in the shape of data: their output may be a view of the parameter itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, judge_step

TAKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expand_as": lambda p, h: h + p.expand_as(h),
    "expand_as one row": lambda p, h: h * p.expand_as(h[:1]),
    "view_as": lambda p, h: h * p.view_as(h[:1]),
    "reshape_as": lambda p, h: h * p.reshape_as(h[:1]),
    "type_as": lambda p, h: h * p.type_as(h),
    "to another": lambda p, h: h * p.to(h),
    "to another, copied": lambda p, h: h * p.to(h, copy=True),
    "broadcast_tensors": lambda p, h: torch.mul(*torch.broadcast_tensors(h, p)),
    "meshgrid": lambda p, h: torch.mul(*torch.meshgrid(h.sum(1), p[0], indexing="ij")),
    "atleast_2d": lambda p, h: torch.mul(*torch.atleast_2d(h, p)),
    "atleast_2d, the parameter first": lambda p, h: torch.mul(*torch.atleast_2d(p, h)),
}


class Taken(nn.Module):
    def __init__(self, taken: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.taken = nn.Linear(4, 5), nn.Linear(5, 3), taken
        self.row = nn.Parameter(inputs.normal(1, 5, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.taken(self.row, self.first(x))))


def setup(taken: Callable[[Tensor, Tensor], Tensor]) -> Setup:
    torch.manual_seed(0)
    return Setup(Taken(taken).double(), *inputs.pair(6, 3, 4, classes=3))


@pytest.mark.parametrize("keywords", [{}, {"memory": "two_pass"}, {"micro_batch": 4}], ids=str)
@pytest.mark.parametrize("name", TAKEN)
def test_exact_and_the_parameter_is_left_alone(name: str, keywords: dict[str, Any]) -> None:
    """The proof of independence fills outputs with NaN, and must not reach a parameter that they are views of."""
    assert judge_step(metakern.l2rw_step, setup(TAKEN[name]), **keywords).result.engine == "ghost"


def test_a_parameter_that_gives_its_shape_alone() -> None:
    """It takes no part, which the error says; nor does it stand in the way where that is allowed."""
    case = setup(lambda p, h: h[:, :1].expand_as(p.expand(len(h), -1)))
    before = Snapshot.of(case.model)
    with pytest.raises(ValueError, match="row"):
        metakern.l2rw_step(case.model, case.batch, case.meta_batch)
    before.assert_unchanged(case.model)
    for memory in ("reuse", "two_pass"):
        result = metakern.l2rw_step(case.model, case.batch, case.meta_batch, allow_unused=True, memory=memory)
        assert result.engine == "ghost"
        assert case.model.get_parameter("row").grad is None


def test_a_parameter_that_gives_its_sign_alone() -> None:
    """Part of a call, of which it gets no gradient."""
    case = setup(lambda p, h: F.hinge_embedding_loss(h, p.expand(len(h), -1), reduction="none"))
    assert metakern.l2rw_step(case.model, case.batch, case.meta_batch).engine == "ghost"
    assert not case.model.get_parameter("row").grad.any()


class HandedBack(nn.Module):
    """The user's input, through a call that takes a parameter as well and returns both as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.last = nn.Parameter(inputs.normal(1, 4, seed=3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.mul(*torch.atleast_2d(x, self.row)))


def test_an_input_that_is_handed_back() -> None:
    torch.manual_seed(0)
    case = Setup(HandedBack().double(), *inputs.pair(6, 3, 4, classes=3))
    x, before = case.batch[0].requires_grad_(), case.batch[0].detach().clone()
    assert judge_step(metakern.l2rw_step, case).result.engine == "ghost"
    assert torch.equal(x, before)
