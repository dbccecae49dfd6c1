"""Operators called by their own names, and those of extensions, write where their schema says so."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.judge import Snapshot

ATEN = torch.ops.aten


@torch.library.custom_op("metakern_tests::shrink", mutates_args=("state",))
def shrink(by: float, state: Tensor) -> Tensor:
    state.mul_(by)
    return state.new_zeros(())


@torch.library.custom_op("metakern_tests::shrink_all", mutates_args=("states",))
def shrink_all(states: list[Tensor], by: float) -> None:
    for state in states:
        state.mul_(by)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "overload": lambda scale: ATEN.mul_.Scalar(scale, 0.5),
    "keywords": lambda scale: ATEN.mul_.Scalar(self=scale, other=0.5),
    "packet": lambda scale: ATEN.mul_(scale, 0.5),
    "packet-keywords": lambda scale: ATEN.mul_(self=scale, other=0.5),
    "out": lambda scale: ATEN.mul.out(scale, torch.full_like(scale, 0.5), out=scale),
    "outs": lambda scale: ATEN.max.dim_max(0.5 * scale[None], 0, max=scale, max_values=torch.empty(0).long()),
    "list": lambda scale: ATEN._foreach_mul_.Scalar([scale], 0.5),
    "extension": lambda scale: shrink(0.5, scale),
    "extension-keywords": lambda scale: shrink(by=0.5, state=scale),
    "extension-list": lambda scale: torch.ops.metakern_tests.shrink_all([scale], 0.5),
}
BATCH, META = inputs.pair(5, 3, 4, classes=3)


class Shrinking(nn.Module):
    """Each pass halves a frozen factor and the bias of a layer."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.head, self.write = nn.Linear(4, 6), nn.Linear(6, 3), write
        self.scale = nn.Parameter(torch.randn(6), requires_grad=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.scale)
            self.write(self.linear.bias)
        return self.head(torch.tanh(self.linear(x)) * self.scale)


@pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
@pytest.mark.parametrize("write", WRITES)
def test_written_once(write: str, engine: str) -> None:
    model, plain = Shrinking(WRITES[write]), Shrinking(lambda scale: scale.mul_(0.5))
    before = Snapshot.of(model)
    metakern.grad_dots(model, BATCH, META, engine=engine)
    before.assert_unchanged(model)
    found = metakern.l2rw_step(model, BATCH, META, engine=engine)
    want = metakern.l2rw_step(plain, BATCH, META, engine="double_backward")
    budget.assert_within(found.dots, want.dots, want.dots.abs().max())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def failing(dots: Tensor) -> Tensor:
    raise ArithmeticError


@pytest.mark.parametrize("write", WRITES)
def test_nothing_is_left_of_a_failed_step(write: str) -> None:
    model = Shrinking(WRITES[write])
    before = Snapshot.of(model)
    with pytest.raises(ArithmeticError):
        metakern.reweight_step(model, BATCH, META, rule=failing)
    before.assert_unchanged(model)
