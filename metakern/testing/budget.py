"""How large an error may be: every tolerance of the project is computed here, from the dtype and the size of the
operands.

A dot product is a sum that cancels, so its error is judged against |g||v| (what it could have been), never against
the dot itself; a weighted gradient against sum_n |w_n||g_n|. See docs/numerics.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metakern.testing.oracle import Oracle

FLOAT64_UNIT = 1e-12
"""What the library promises in float64, as a share of |g||v|: some thousand roundings, far below any wrong formula."""

CONFIDENCE = 8.0
"""Rounding errors of m terms grow like sqrt(m) unit roundoffs times a constant; 8 leaves a chance below 1e-13."""


@dataclass(frozen=True)
class Verdict:
    """One comparison: the largest error, the budget where it is most used, and the share of the budget used there."""

    name: str
    error: float
    budget: float
    share: float

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.2e}, budget {self.budget:.2e}, {100 * self.share:.1f} % used"

    @property
    def ok(self) -> bool:
        return self.share <= 1.0


def unit(dtype: torch.dtype, terms: int = 1) -> float:
    """Error allowed per unit of scale after accumulating `terms` products of `dtype` operands.

    float64: 1e-12. Otherwise eps(dtype) for storing the result + CONFIDENCE * sqrt(terms) * eps(float32) / 2, since
    the library accumulates in float32 at least.
    Source: Higham & Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 2019, theorem
    2.4.
    """
    if dtype == torch.float64:
        return FLOAT64_UNIT
    accumulation = CONFIDENCE * math.sqrt(max(terms, 1)) * torch.finfo(torch.float32).eps / 2
    return torch.finfo(dtype).eps + accumulation


def verdict(name: str, got: Tensor, want: Tensor, budget: Tensor | float) -> Verdict:
    """Compare elementwise; NaN and infinity exceed any budget. Raises ValueError for another shape."""
    if got.shape != want.shape:
        raise ValueError(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if want.numel() == 0:
        return Verdict(name, 0.0, 0.0, 0.0)
    found = got.detach().to_dense().double()  # compared where it is: a model's gradients are large
    error = (found - want.detach().to(found.device).double()).abs()
    allowed = torch.as_tensor(budget, dtype=torch.float64, device=found.device).expand_as(error)
    # 0/0 is a perfect result where nothing was allowed; anything/0 is infinite.
    share = torch.where(error == 0, torch.zeros_like(error), error / allowed).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(share.argmax())
    return Verdict(name, float(error.flatten()[worst]), float(allowed.flatten()[worst]), float(share.flatten()[worst]))


def assert_within(
    got: Tensor,
    want: Tensor,
    scale: Tensor | float,
    *,
    dtype: torch.dtype | None = None,
    terms: int = 1,
    name: str = "value",
) -> float:
    """Assert |got - want| <= unit(dtype, terms) * scale; return the share of the budget used.

    `scale` is what the sum could have been had nothing cancelled, e.g. sum |a||b| for a dot; `terms` how many
    products it has; `dtype` that of the operands (default: got's).
    """
    allowed = unit(dtype or got.dtype, terms) * torch.as_tensor(scale, device="cpu").detach().double()
    return _require(verdict(name, got, want, allowed))


def beside_plain(plain: Tensor, truth: Tensor, scale: float) -> float:
    """Error allowed beside plain PyTorch, which made `plain` of what is `truth` in float64: twice what it lost, plus
    8 eps of `scale`, the size that the result would have had nothing cancelled.
    """
    return _twice(float((plain.double() - truth).abs().max()), plain.dtype, scale)


def dots_verdict(dots: Tensor, oracle: Oracle, *, plain: Oracle | None = None, name: str = "dots") -> Verdict:
    """Judge dots[n] against the float64 oracle: the budget of example n is band * |g_n||v|.

    `plain` is the same loop run in the working dtype; without it the dtype of `dots` must be float64. See `_band`.
    """
    scale = oracle.example_norms * oracle.meta_norm
    measured = None if plain is None else _relative(plain.dots, oracle.dots, scale)
    return verdict(name, dots, oracle.dots, _band(dots.dtype, measured) * scale)


def gradient_verdict(
    grads: Mapping[str, Tensor | None], oracle: Oracle, *, weights: Tensor | None = None, plain: Oracle | None = None
) -> Verdict:
    """Judge a weighted gradient, tensor by tensor: the budget of each element is band * sum_n |w_n||g_n|.

    The truth is formed with `weights` where given (the weights that the step really took), else with the oracle's
    own; so an error of the dots is charged to the dots and not a second time here. Returns the verdict of the worst
    parameter.
    """
    expected = oracle.gradient(oracle.weights if weights is None else weights)
    worst = Verdict("gradient", 0.0, 0.0, 0.0)
    scale = oracle.gradient_scale(oracle.weights if weights is None else weights)
    names = set(expected) ^ {name for name, grad in grads.items() if grad is not None}
    if names:
        raise AssertionError(f"gradients are missing or should not be there: {sorted(names)}")
    reference = None if plain is None else plain.gradient(plain.weights)
    truth = None if plain is None else oracle.gradient(plain.weights)
    for name, want in expected.items():
        grad = grads[name]
        assert grad is not None
        measured = None if reference is None or truth is None else _relative(reference[name], truth[name], scale)
        result = verdict(f".grad of {name}", grad, want, _band(grad.dtype, measured) * scale)
        worst = max(worst, result, key=lambda item: item.share)
    return worst


def assert_dots(dots: Tensor, oracle: Oracle, *, plain: Oracle | None = None, name: str = "dots") -> float:
    """`dots_verdict` as an assertion; returns the share of the budget used."""
    return _require(dots_verdict(dots, oracle, plain=plain, name=name))


def assert_gradient(
    grads: Mapping[str, Tensor | None], oracle: Oracle, *, weights: Tensor | None = None, plain: Oracle | None = None
) -> float:
    """`gradient_verdict` as an assertion; returns the share of the budget used."""
    return _require(gradient_verdict(grads, oracle, weights=weights, plain=plain))


def _require(result: Verdict) -> float:
    if not result.ok:
        raise AssertionError(f"over the error budget: {result}")
    return result.share


def _relative(got: Tensor, want: Tensor, scale: Tensor) -> float:
    error = (got.double() - want.double()).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)
    return float(error.max()) if error.numel() else 0.0


def _band(dtype: torch.dtype, measured: float | None) -> float:
    """Share of the scale that may be lost: 1e-12 in float64, else twice what plain PyTorch loses on the same work,
    plus 8 eps.

    A network's error depends on its depth and conditioning, which no formula in eps knows: so plain autograd in the
    same dtype is measured beside it. The few eps keep a lucky plain run from setting an impossible mark.
    """
    if dtype == torch.float64:
        return FLOAT64_UNIT
    if measured is None:
        raise ValueError(f"a budget for {dtype} needs plain=, the oracle's loop in that dtype")
    return _twice(measured, dtype)


def _twice(lost: float, dtype: torch.dtype, scale: float = 1.0) -> float:
    return 2 * lost + CONFIDENCE * torch.finfo(dtype).eps * scale
