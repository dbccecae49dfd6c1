"""Forward mode and backward pass of one function must be one derivative: <u, J v> = <J^T u, v>."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import metakern
from metakern.layers.forward.forward_mode import dual_level
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

ROOT = inputs.normal(4, 4, seed=1)
SYMMETRIC = ROOT @ ROOT.T + torch.eye(4, dtype=torch.float64)
TOKENS = torch.tensor([[0, 2], [2, 3], [1, 2]])
STEPS = torch.tensor([0.1, 0.2, 0.3, 0.4])
PLACES = torch.tensor([[0, 1, 1, 3]])
"""Places of a pool whose windows overlap: two entries may have come from one."""

AGREES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "eigh": (torch.linalg.eigh, SYMMETRIC),
    "eigh of the upper triangle": (partial(torch.linalg.eigh, UPLO="U"), SYMMETRIC),
    "cholesky": (torch.linalg.cholesky, SYMMETRIC),
    "cholesky, upper": (lambda x: torch.linalg.cholesky(input=x, upper=True), SYMMETRIC),
    "cholesky_ex": (lambda x: torch.linalg.cholesky_ex(x).L, SYMMETRIC),
    "embedding": (lambda table: F.embedding(TOKENS, table, padding_idx=2), ROOT),
    "embedding, padding from the end": (lambda table: F.embedding(TOKENS, table, -2), ROOT),
    "torch.embedding": (lambda table: torch.embedding(table, TOKENS, 2), ROOT),
    "torch.embedding without padding": (lambda table: torch.embedding(table, TOKENS), ROOT),
    "fake_quantize_per_tensor_affine": (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.2, 1, -4, 3), ROOT),
    "fake_quantize_per_channel_affine": (
        lambda x: torch.fake_quantize_per_channel_affine(x, STEPS, torch.arange(4).int(), 0, -4, 3),
        ROOT,
    ),
    "max_unpool1d": (lambda x: F.max_unpool1d(x, PLACES.expand(4, 4), 2, 1), ROOT),
    "max_unpool2d": (lambda x: F.max_unpool2d(x.view(1, 4, 2, 2), PLACES.expand(4, 4).view(1, 4, 2, 2), 2), ROOT),
    "max_unpool3d": (lambda x: F.max_unpool3d(x.view(4, 1, 2, 2), PLACES.expand(4, 4).view(4, 1, 2, 2), 2), ROOT),
}

REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "as_strided_scatter": lambda x: torch.as_strided_scatter(x, x[:2, :2], (2, 2), (1, 2)),
    "Tensor.as_strided_scatter": lambda x: x.as_strided_scatter(x[:2, :2], (2, 2), (1, 2)),
    "cholesky_inverse": torch.cholesky_inverse,
    "triangular_solve": lambda x: torch.triangular_solve(x, x + 3)[0],
    "embedding by frequency": lambda x: F.embedding(TOKENS, x, scale_grad_by_freq=True),
    "torch.embedding by frequency": lambda x: torch.embedding(x, TOKENS, -1, True),
    "embedding_bag by frequency": lambda x: F.embedding_bag(TOKENS, x, scale_grad_by_freq=True, mode="sum"),
}


def forward(function: Callable[[Tensor], Any], x: Tensor, v: Tensor) -> list[Tensor]:
    with dual_level():
        outputs = tree_leaves(function(forward_ad.make_dual(x, v)))
        return [forward_ad.unpack_dual(output).tangent for output in outputs]


@pytest.mark.parametrize("name", AGREES)
def test_one_derivative_both_ways(name: str) -> None:
    """In a direction that no gradient would have: not symmetric, and not zero where none arrives."""
    function, x = AGREES[name]
    v = inputs.normal(4, 4, seed=2)
    tangents = forward(function, x, v)
    leaf = x.clone().requires_grad_()
    outputs = tree_leaves(function(leaf))
    cotangents = [inputs.normal(*output.shape, seed=3 + k) for k, output in enumerate(outputs)]
    (gradient,) = torch.autograd.grad(outputs, leaf, cotangents)
    along = sum((t * u).sum() for t, u in zip(tangents, cotangents, strict=True))
    budget.assert_within(along, (gradient * v).sum(), 100 * gradient.norm() * v.norm())


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")
def test_another_derivative_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match="forward"):
        forward(REFUSED[name], SYMMETRIC, ROOT)


class Tied(nn.Module):
    """A table that is the head as well, so that its row of padding has a gradient, and normalisation over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 5, padding_idx=0), nn.BatchNorm1d(5)
        nn.init.normal_(self.table.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.table(tokens).mean(1))) @ self.table.weight.T


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_padding_of_a_tied_table_in_forward_mode(memory: str) -> None:
    torch.manual_seed(0)
    batch, meta_batch = ((inputs.labels(n, 4, classes=7, seed=n), inputs.labels(n, classes=7, seed=1)) for n in (6, 3))
    batch[0][:, 0] = meta_batch[0][:, 0] = 0
    setup = Setup(Tied().double(), batch, meta_batch, interacting=True)
    assert judge_step(metakern.l2rw_step, setup, memory=memory).result.engine == "jvp"


class Solved(nn.Module):
    """An example times the inverse of a triangle of a parameter, whose other triangle another call has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(ROOT + 4 * torch.eye(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        solved = torch.triangular_solve(x.unsqueeze(-1), self.matrix.expand(len(x), 4, 4)).solution.squeeze(-1)
        return solved + x @ self.matrix


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")
def test_without_a_forward_mode_ghost_takes_two_backward_passes() -> None:
    setup = Setup(Solved(), *inputs.pair(6, 3, 4, classes=4))
    assert judge_step(metakern.l2rw_step, setup).result.engine == "ghost"


class Mixed(nn.Module):
    """Sums whose parts are scaled by a number, some of them of parameters, some of data alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.row = nn.BatchNorm1d(4), nn.Parameter(inputs.normal(4, seed=1))
        self.left, self.right = (nn.Parameter(inputs.normal(*shape, seed=2)) for shape in ((6, 2), (2, 4)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.add(torch.sub(self.norm(x), x, alpha=0.3), self.row, alpha=0.5)
        h = torch.addmm(x, self.left[: len(x)], self.right, beta=0.2, alpha=0.6) + torch.rsub(h, x, alpha=2)
        h = torch.addcmul(x, h, self.row, value=0.7) + torch.addcdiv(x, x, 1 + h.square(), value=0.4)
        return h.add_(x, alpha=0.1).sub_(x.square(), alpha=0.2)


def test_scaled_sums_in_a_program() -> None:
    """torch's forward mode of them ends the process while it is traced, unless all parts have a tangent."""
    setup = Setup(Mixed().double(), *inputs.pair(6, 3, 4, classes=4), interacting=True)
    program = metakern.compile_step(setup.model, setup.batch, setup.meta_batch, backend="eager")

    def step(model: nn.Module, batch: Any, meta_batch: Any, loss_fn: Any) -> Any:
        return program(batch, meta_batch)

    assert judge_step(step, setup).result.engine == "jvp"
