"""`einsum`, `matmul` and `bmm` with a parameter: by one rule whatever the letters say, or by forward mode through the
call.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

BY_RULE: dict[str, tuple[int, ...]] = {
    "nti,io->nto": (5, 6),
    "nti,oi->nto": (6, 5),
    "n t i, i h d -> n h t d": (5, 2, 3),
    "nti,io->tno": (5, 6),
    "nti,i->nt": (5,),
    "nti,ti->n": (4, 5),
    "nti,tio->no": (4, 5, 6),
    "nti,ti->nti": (4, 5),
    "...i,io->...o": (5, 6),
    "n...,io->n...io": (2, 3),
    "nti,io->nio": (5, 3),
}
OTHERS: dict[str, tuple[int, ...]] = {
    "nti,io": (5, 6),
    "nti,io->nt": (5, 6),
    "nti,ab->n": (2, 3),
    "nti,tt->nti": (4, 4),
    "...,...i->...i": (4, 5, 3),
    "nti,ti->ni": (1, 5),
}


class Network(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...], weight_first: bool, as_list: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        if weight_first:
            left, arrow, right = equation.partition("->")
            equation = ",".join(reversed(left.split(","))) + arrow + right
        self.equation, self.weight_first, self.as_list = equation, weight_first, as_list
        self.stem, self.weight, self.head = nn.Linear(5, 5), nn.Parameter(torch.randn(shape)), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        operands = self.stem(x).tanh(), self.weight
        operands = operands[::-1] if self.weight_first else operands
        y = torch.einsum(self.equation, list(operands)) if self.as_list else torch.einsum(self.equation, *operands)
        return self.head(y.tanh().movedim(list(y.shape).index(len(x)), 0).reshape(len(x), -1).sum(1, keepdim=True))


def setup(equation: str, shape: tuple[int, ...], weight_first: bool = False, as_list: bool = False) -> Setup:
    model = Network(equation, shape, weight_first, as_list).double()
    return Setup(model, *inputs.pair(7, 9, 4, 5, classes=3))


def rule(given: Setup) -> str:
    uses = metakern.explain(given.model, given.batch, given.meta_batch).uses
    return next(use.rule for use in uses if "weight" in use.parameters.split(", "))


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("equation", [*BY_RULE, *OTHERS])
def test_is_exact(equation: str, weight_first: bool, as_list: bool) -> None:
    given = setup(equation, {**BY_RULE, **OTHERS}[equation], weight_first, as_list)
    assert rule(given) == ("contraction" if equation in BY_RULE else "generic")
    for memory in ("reuse", "two_pass"):
        assert judge_step(metakern.l2rw_step, given, memory=memory).result.engine == "ghost"


MATRICES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "on the left": ((6, 4), lambda x, w: w @ x),
    "of every position": ((4, 5, 6), lambda x, w: x.unsqueeze(-2) @ w),
    "of every position, bmm": ((4, 5, 6), lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1)),
    "of heads": ((2, 5, 3), lambda x, w: torch.matmul(x.unsqueeze(1), other=w)),
    "of heads, on the left": ((2, 3, 4), lambda x, w: w.matmul(x.unsqueeze(1))),
    "a vector": ((5,), lambda x, w: x @ w),
    "a vector on the left": ((4,), lambda x, w: w @ x),
    "two stacks": ((3, 1, 5, 6), lambda x, w: x.unsqueeze(1).unsqueeze(1) @ w),
    "for all heads": ((1, 5, 3), lambda x, w: torch.stack([x, -x], 1) @ w),
}


class OfMatrices(Network):
    def __init__(self, shape: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__("", shape, weight_first=False, as_list=False)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(self.stem(x).tanh(), self.weight).tanh()
        return self.head(y.reshape(len(x), -1).sum(1, keepdim=True))


@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name: str) -> None:
    given = Setup(OfMatrices(*MATRICES[name]).double(), *inputs.pair(7, 9, 4, 5, classes=3))
    assert rule(given) == ("generic" if name == "for all heads" else "contraction")
    for memory in ("reuse", "two_pass"):
        assert judge_step(metakern.l2rw_step, given, memory=memory).result.engine == "ghost"


class OfExamples(nn.Module):
    """A parameter with entries for every place in the batch, and complex features that a real one scales."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.scale = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("ni,ni->ni", x, self.weight)
        return self.head(torch.einsum("ni,i->ni", torch.complex(y, x), self.scale).abs())


def test_an_input_of_size_one_that_is_summed_over() -> None:
    """einsum widens it."""
    torch.manual_seed(0)
    model = OfMatrices((5, 4), lambda x, w: torch.einsum("ni,io->no", x.flatten(1).sum(1, keepdim=True), w)).double()
    given = Setup(model, *inputs.pair(7, 9, 4, 5, classes=3))
    assert rule(given) == "generic"
    assert judge_step(metakern.l2rw_step, given).result.engine == "ghost"


def test_of_single_examples() -> None:
    given = Setup(OfExamples().double(), *inputs.pair(6, 6, 5, classes=3), interacting=True)
    judged = judge_step(metakern.l2rw_step, given)
    assert judged.result.engine == "ghost"
    assert (judged.result.weights == 0).any()


class Several(nn.Module):
    """Products of three operands, of two parameters and with indices in place of letters are other calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("nti,io,oc->nc", x, self.first, self.second)
        return y + torch.einsum(x, [0, 1, 2], self.first @ self.second, [2, 3], [0, 3])


def test_of_other_operands() -> None:
    judge_step(metakern.l2rw_step, Setup(Several().double(), *inputs.pair(7, 9, 4, 5, classes=3)), engine="ghost")


def test_under_autocast() -> None:
    """The product is in bfloat16, and so are B and what is made of it; .grad is in float32."""
    given = setup("nti,io->nto", (5, 6))
    given.model.float()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(batch[0].float()), batch[1], reduction="none")

    batches = given.batch, given.meta_batch
    found = metakern.l2rw_step(given.model, *batches, loss_fn=losses, engine="ghost").dots
    truth = metakern.grad_dots(given.model, *batches, loss_fn=losses, engine="double_backward").dots
    assert torch.nn.functional.cosine_similarity(found, truth, dim=0) > 0.99
    assert given.model.weight.grad is not None
    assert given.model.weight.grad.dtype == torch.float32
