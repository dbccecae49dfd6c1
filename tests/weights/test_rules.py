"""Weight rules: what each promises, in the corners where they are usually wrong."""

from functools import partial
from inspect import signature

import pytest
import torch

from metakern import weights
from metakern.testing import budget, inputs
from metakern.testing.oracle import clip_normalise
from metakern.weights import rules


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_clip_normalise(n: int, dtype: torch.dtype) -> None:
    dots = inputs.normal(n, seed=n, dtype=dtype)
    got = weights.clip_normalise(dots)
    assert got.dtype == dtype
    budget.assert_within(got, clip_normalise(dots.double()), 1.0, terms=n)
    assert bool((got[dots <= 0] == 0).all())
    assert bool((got >= 0).all())


def test_clip_normalise_sums_to_one_or_zero() -> None:
    dots = inputs.normal(9)
    budget.assert_within(weights.clip_normalise(dots).sum(), torch.tensor(1.0, dtype=torch.float64), 1.0)
    assert not weights.clip_normalise(-dots.abs()).any()
    assert not weights.clip_normalise(torch.zeros(4)).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_cancels(scale: float) -> None:
    """Dots are in units of loss^2 per parameter^2: no size may be special."""
    dots = inputs.normal(9, dtype=torch.float32)
    for rule in (
        weights.clip_normalise,
        weights.floor,
        weights.unclipped,
        weights.softmax,
        partial(weights.top_k, k=3),
    ):
        budget.assert_within(rule(dots * scale), rule(dots).double(), 1.0, terms=100, name=str(rule))


def test_unclipped() -> None:
    dots = inputs.normal(9)
    budget.assert_within(weights.unclipped(dots), dots / dots.abs().sum(), 1.0)
    assert not weights.unclipped(torch.zeros(3)).any()


def test_softmax() -> None:
    dots = inputs.normal(9)
    got = weights.softmax(dots, temperature=0.5)
    budget.assert_within(got.sum(), torch.tensor(1.0, dtype=torch.float64), 1.0)
    assert torch.equal(got.argsort(), dots.argsort())
    budget.assert_within(weights.softmax(torch.ones(4)), torch.full((4,), 0.25), 1.0)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        weights.softmax(dots, temperature=0.0)


def test_floor() -> None:
    # The mean size is 2, a tenth of it 0.2.
    got = weights.floor(torch.tensor([3.0, -4.0, 0.1, 0.9], dtype=torch.float64))
    expected = torch.tensor([3.0, 0.2, 0.2, 0.9], dtype=torch.float64) / 4.3
    budget.assert_within(got, expected, 1.0)
    for alike in (torch.tensor([-1.0, -5.0, -2.0]), torch.zeros(3)):
        budget.assert_within(weights.floor(alike), torch.full((3,), 1 / 3), 1.0)
    assert bool(weights.floor(torch.tensor([1.0, float("nan")])).isnan().all())
    with pytest.raises(ValueError, match="share must be positive, got 0"):
        weights.floor(torch.ones(2), share=0.0)


def test_named_rules_are_those_that_need_the_dots_alone() -> None:
    exported = {name: rule for name, rule in vars(weights).items() if getattr(rule, "__module__", "") == rules.__name__}
    alone = {
        name: rule
        for name, rule in exported.items()
        if all(p.default is not p.empty for p in list(signature(rule).parameters.values())[1:])
    }
    assert exported.keys() - alone.keys() == {"top_k"}
    assert alone == weights.RULES
    with pytest.raises(ValueError, match=r"rule must be one of .* or a function of the dots, got 'top_k'"):
        weights.weight_rule("top_k")


def test_top_k() -> None:
    got = weights.top_k(torch.tensor([0.1, -3.0, 2.0, 1.0]), k=2)
    assert got.tolist() == [0.0, 0.0, 0.5, 0.5]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k must be.*got {k}"):
            weights.top_k(torch.zeros(4), k=k)


def test_rules_by_name() -> None:
    for name, rule in weights.RULES.items():
        assert weights.weight_rule(name) is rule
    with pytest.raises(ValueError, match=r"rule must be one of.*clip_normalise.*'best'"):
        weights.weight_rule("best")
