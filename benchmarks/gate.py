"""No number without a green check: every provider is held against the float64 oracle before it is timed."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Batch, Problem, losses_of
from benchmarks.providers import Outcome
from metakern.testing import budget
from metakern.testing.oracle import oracle

EXAMPLES = 16
"""Dots of so many examples, spread over the batch, are checked singly; the gradient is checked whole."""


@dataclass(frozen=True)
class Shares:
    """Of the error budgets: above 1 is wrong."""

    dots: float
    gradient: float

    @property
    def green(self) -> bool:
        return self.dots <= 1 and self.gradient <= 1


class Gate:
    """The truth about one problem: the loop over single examples in float64, and in the working dtype beside it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        interacting = problem.case.interacting  # then no example can be taken out of its batch
        stride = 1 if interacting else max(1, problem.case.n // EXAMPLES)
        rows = torch.arange(0, problem.case.n, stride)
        self.rows = (rows if interacting else rows[:EXAMPLES]).to(problem.batch[1].device)
        some: Batch = (problem.batch[0][self.rows], problem.batch[1][self.rows])
        self.truth, self.plain = (
            oracle(problem.model, some, problem.meta_batch, loss_fn=losses_of, dtype=dtype, interacting=interacting)
            for dtype in (torch.float64, problem.case.dtype)
        )

    def judge(self, outcome: Outcome) -> Shares:
        """Shares of the budgets that an outcome and the `.grad` it left behind use; the unit has no weights."""
        dots = 0.0 if outcome.dots is None else self._dots_share(outcome.dots[self.rows], outcome.dot_precision)
        return Shares(dots, 0.0 if outcome.weights is None else self._gradient_share(outcome.weights))

    def _dots_share(self, found: Tensor, precision: str) -> float:
        if precision == "bf16":  # three operands are rounded, and a product of two of them once more
            allowed = 4 * budget.unit(torch.bfloat16) * self.truth.example_norms * self.truth.meta_norm
            return budget.verdict("dots", found, self.truth.dots, allowed).share
        return budget.dots_verdict(found, self.truth, plain=self.plain).share

    def _gradient_share(self, weights: Tensor) -> float:
        """Worst parameter of `.grad` against one float64 backward of the losses under these weights.

        Budget as in `budget.gradient_verdict`, with the mean |g_n| of the checked examples for all of them.
        """
        scale = float(weights.double().abs().sum() * self.truth.example_norms.mean())
        want = self._truth_for(weights)
        plain = self._weighted(slice(None), weights, self.problem.case.dtype)
        worst = 0.0
        for name, param in self.problem.model.named_parameters():
            if param.grad is None:
                raise AssertionError(f"no gradient for {name}")
            allowed = budget.beside_plain(plain[name], want[name], scale)
            worst = max(worst, budget.verdict(name, param.grad, want[name], allowed).share)
        return worst

    def _truth_for(self, weights: Tensor) -> dict[str, Tensor]:
        """In float64, in which attention keeps every matrix of scores, so a few examples at a time."""
        case = self.problem.case
        size = case.n if case.interacting else max(1, case.n // EXAMPLES)
        first, *others = (slice(start, start + size) for start in range(0, case.n, size))
        total = self._weighted(first, weights, torch.float64)
        for rows in others:
            for name, g in self._weighted(rows, weights, torch.float64).items():
                total[name] += g
        return total

    def _weighted(self, rows: slice, weights: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        model = copy.deepcopy(self.problem.model).to(dtype)
        x, y, weights = (given[rows] for given in (*self.problem.batch, weights))
        x = x.to(dtype) if x.is_floating_point() else x
        losses = losses_of(model, (x, y))
        params = dict(model.named_parameters())
        found = torch.autograd.grad(losses, list(params.values()), weights.to(dtype))
        return dict(zip(params, found, strict=True))
