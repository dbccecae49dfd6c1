"""The budget must let rounding pass and nothing else."""

import math

import pytest
import torch

from metakern.testing import budget, inputs
from metakern.testing.models import mlp
from metakern.testing.oracle import oracle


def test_unit_in_float64_is_the_promise() -> None:
    assert budget.unit(torch.float64) == budget.unit(torch.float64, terms=10**6) == 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unit_grows_like_a_random_walk(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    few, many = budget.unit(dtype, 100) - eps, budget.unit(dtype, 10000) - eps
    assert many == pytest.approx(10 * few)


@pytest.mark.parametrize("terms", [1, 100, 10000])
def test_sums_in_float32_fit(terms: int) -> None:
    a, b = (inputs.normal(32, terms, seed=seed, dtype=torch.float32) for seed in (0, 1))
    scale = (a.double() * b.double()).abs().sum(1)
    share = budget.assert_within((a * b).cumsum(1)[:, -1], (a.double() * b.double()).sum(1), scale, terms=terms)
    assert 0 < share < 1


def test_wrong_numbers_do_not_fit() -> None:
    want = inputs.normal(8)
    with pytest.raises(AssertionError, match="over the error budget"):
        budget.assert_within(want * (1 + 1e-9), want, want.abs())
    with pytest.raises(AssertionError):
        budget.assert_within(torch.full_like(want, math.nan), want, want.abs())
    with pytest.raises(AssertionError):
        budget.assert_within(want, want + math.inf, want.abs())
    with pytest.raises(ValueError, match="shape"):
        budget.assert_within(want[:4], want, 1.0)


def test_nothing_allowed_means_equal() -> None:
    zeros = torch.zeros(3)
    assert budget.assert_within(zeros, zeros, 0.0) == 0.0
    with pytest.raises(AssertionError):
        budget.assert_within(zeros + 1e-30, zeros, 0.0)


def test_float32_needs_a_plain_run_beside_it() -> None:
    model = mlp(8, 2, 3)
    batch, meta_batch = inputs.pair(5, 3, 8, classes=3, dtype=torch.float32)
    truth, plain = (oracle(model, batch, meta_batch, dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert budget.assert_dots(plain.dots, truth, plain=plain) < 1
    assert budget.assert_gradient(plain.gradient(plain.weights), truth, weights=plain.weights, plain=plain) < 1
    with pytest.raises(ValueError, match="needs plain="):
        budget.assert_dots(plain.dots, truth)
    wrong = plain.dots + 1e-4 * truth.example_norms.float() * float(truth.meta_norm)
    with pytest.raises(AssertionError):
        budget.assert_dots(wrong, truth, plain=plain)


def test_missing_and_surplus_gradients_are_named() -> None:
    model = mlp(8, 1, 3).double()
    batch, meta_batch = inputs.pair(5, 3, 8, classes=3)
    truth = oracle(model, batch, meta_batch)
    grads: dict = truth.gradient(truth.weights)
    with pytest.raises(AssertionError, match=r"0\.weight"):
        budget.assert_gradient({**grads, "0.weight": None}, truth)
    with pytest.raises(AssertionError, match="surplus"):
        budget.assert_gradient({**grads, "surplus": torch.zeros(1)}, truth)
