import pytest
import torch

from metakern.methods import Setting
from metakern.methods.hard_mining import first, hardest
from metakern.methods.proportion import inverse_share_weights, opposite_share_weights
from metakern.methods.random_weights import random_weights
from metakern.methods.weighted_step import uniform_weights


def setting(*counts: int, seed: int = 0) -> Setting:
    return Setting(torch.tensor(counts), torch.Generator().manual_seed(seed))


LOSSES = torch.tensor([0.1, 0.4, 0.3, 0.2, 0.5])
TARGETS = torch.tensor([1, 1, 0, 1, 1])


def test_uniform():
    assert uniform_weights(LOSSES, TARGETS, setting(1, 9)).tolist() == pytest.approx([0.2] * 5)


def test_random_is_the_rectified_gaussian():
    drawn = torch.randn(5, generator=torch.Generator().manual_seed(7)).clamp(min=0)
    weights = random_weights(LOSSES, TARGETS, setting(1, 9, seed=7))
    torch.testing.assert_close(weights, drawn / drawn.sum())
    many = random_weights(torch.zeros(10000), torch.zeros(10000, dtype=torch.int64), setting(1, 9))
    assert abs((many > 0).float().mean() - 0.5) < 0.02
    assert float(many.sum()) == pytest.approx(1, abs=1e-4)


def test_random_may_drop_a_whole_batch():
    one = torch.zeros(1)
    draws = setting(1, 9)
    weights = [float(random_weights(one, one.long(), draws)) for _ in range(50)]
    assert set(weights) == {0.0, 1.0}


def test_proportion_normalised_by_hand():
    # Shares 0.1 and 0.9: weights 10 and 10/9, four majority examples and one minority: sum 10 + 40/9 = 130/9.
    weights = inverse_share_weights(LOSSES, TARGETS, setting(10, 90))
    assert weights.tolist() == pytest.approx([1 / 13, 1 / 13, 9 / 13, 1 / 13, 1 / 13])


def test_proportion_as_shipped_by_hand():
    weights = opposite_share_weights(LOSSES, TARGETS, setting(10, 90))
    assert weights.tolist() == pytest.approx([0.1, 0.1, 0.9, 0.1, 0.1])


def test_proportion_as_shipped_has_the_mass_it_is_known_for():
    shares = torch.tensor([0.1, 0.9])
    mass = 100 * (shares * (1 - shares)).sum()
    assert float(mass) == pytest.approx(18)


def test_proportion_as_shipped_needs_two_classes():
    with pytest.raises(ValueError, match="needs two classes, got 3"):
        opposite_share_weights(LOSSES, TARGETS, setting(1, 2, 3))


def test_hard_mining_takes_the_hardest():
    assert sorted(hardest(LOSSES, TARGETS, setting(1, 9)).tolist()) == [2, 4]


def test_hard_mining_as_shipped_takes_the_first():
    assert sorted(first(LOSSES, TARGETS, setting(1, 9)).tolist()) == [0, 2]


def test_hard_mining_without_minority_keeps_one():
    assert hardest(LOSSES, torch.ones(5, dtype=torch.int64), setting(1, 9)).tolist() == [4]


def test_hard_mining_without_majority_keeps_all():
    assert hardest(LOSSES, torch.zeros(5, dtype=torch.int64), setting(1, 9)).tolist() == [0, 1, 2, 3, 4]
