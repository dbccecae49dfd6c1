from itertools import islice

import pytest
import torch

from metakern.data.sampling import class_balanced, shuffled


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shuffled_sees_every_example_once_an_epoch():
    rows = torch.cat(list(islice(shuffled(torch.zeros(10), 4, generator()), 5)))
    assert len(rows) == 20
    assert sorted(rows[:10].tolist()) == list(range(10))
    assert sorted(rows[10:].tolist()) == list(range(10))


def test_shuffled_batch_is_at_most_the_whole_set():
    assert len(next(shuffled(torch.zeros(10), 500, generator()))) == 10


def test_class_balanced():
    targets = torch.tensor([0] * 3 + [1] * 97)
    drawn = list(islice(class_balanced(targets, 10, generator()), 6))
    assert all(torch.bincount(targets[rows]).tolist() == [5, 5] for rows in drawn)
    majority = torch.cat(drawn)
    majority = majority[targets[majority] == 1]
    assert len(majority.unique()) == len(majority)


def test_class_balanced_skips_an_absent_class_and_spreads_the_remainder():
    targets = torch.tensor([0] * 5 + [2] * 50)
    assert torch.bincount(targets[next(class_balanced(targets, 7, generator()))]).tolist() == [4, 0, 3]


@pytest.mark.parametrize("batch_size", [3, 10, 13])
def test_class_balanced_over_many_batches(batch_size):
    """Also with more classes than rows in a batch."""
    targets = torch.arange(70) % 7
    drawn = torch.cat(list(islice(class_balanced(targets, batch_size, generator()), 7 * 6)))
    assert torch.bincount(targets[drawn]).tolist() == [batch_size * 6] * 7


@pytest.mark.parametrize("sampler", [shuffled, class_balanced])
def test_seeded(sampler):
    targets = torch.tensor([0, 1] * 20)
    first, again, other = (torch.stack(list(islice(sampler(targets, 8, generator(seed)), 4))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
