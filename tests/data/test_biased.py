from dataclasses import replace

import pytest
import torch

from metakern.data import NOISE_KINDS, Examples, Source, biased, load
from metakern.data.long_tail import long_tail_counts, step_counts


def made_up(per_class: int = 60, classes: int = 4) -> Source:
    targets = torch.arange(classes).repeat(per_class)
    train = Examples(torch.randn(len(targets), 2), targets, torch.arange(len(targets)))
    test = Examples(torch.randn(4, 2), torch.arange(4) % classes, torch.arange(4))
    return Source("made-up", train, test, tuple("abcdefgh"[:classes]), groups=torch.arange(classes) // 2)


def test_long_tail_is_the_papers_cifar10():
    # The usual CIFAR-10 cut at factor 100, from 5000 a class.
    counts = long_tail_counts(torch.full((10,), 5000), 100)
    assert counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tail_counts(torch.tensor([7, 9]), 1).tolist() == [7, 7]


def test_step_by_hand():
    assert step_counts(torch.full((4,), 100), 20).tolist() == [100, 100, 5, 5]
    assert step_counts(torch.full((4,), 100), 20, minority=0.25).tolist() == [100, 100, 100, 5]


@pytest.mark.parametrize("counts", [long_tail_counts, step_counts])
def test_counts_refuse(counts):
    with pytest.raises(ValueError, match=r"at least 1, got 0\.5"):
        counts(torch.tensor([5, 5]), 0.5)
    with pytest.raises(ValueError, match="leaves a class without examples"):
        counts(torch.tensor([5, 5]), 100)


@pytest.mark.parametrize("seed", range(3))
def test_no_leakage_and_the_truth_kept(seed):
    source = made_up()
    task = biased(source, factor=10, noise="symmetric", rate=0.4, meta_per_class=8, seed=seed)
    train, meta = set(task.train.ids.tolist()), set(task.meta.ids.tolist())
    assert not train & meta
    assert len(train) == len(task.train) == sum([52, 24, 11, 5])
    assert task.meta.counts(4).tolist() == [8] * 4
    # In the made-up source the id tells the class: truth kept, meta set clean.
    assert torch.equal(task.train.ids % 4, task.clean_targets)
    assert torch.equal(task.meta.ids % 4, task.meta.targets)
    wrong = (task.train.targets != task.clean_targets).double().mean()
    assert 0.2 < wrong < 0.6


def test_size_caps_each_class():
    assert biased(made_up(), size=80, meta_per_class=2).train.counts(4).tolist() == [20] * 4


def test_seeded():
    first, again, other = (biased(made_up(), noise="uniform", rate=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.train.targets, again.train.targets)
    assert torch.equal(first.train.ids, again.train.ids)
    assert not torch.equal(first.train.ids, other.train.ids)


def test_real_digits():
    task = biased(load("digits"), noise="background", rate=0.4, meta_per_class=5)
    assert not set(task.train.ids.tolist()) & set(task.test.ids.tolist())
    assert task.train.counts(10).max() > 0.3 * len(task.train)


def test_refuses_a_meta_set_that_takes_all():
    with pytest.raises(ValueError, match=r"below the 60 training examples of the smallest class, '.*', got 60"):
        biased(made_up(), meta_per_class=60)


def test_methods_without_a_meta_set_keep_small_classes_whole():
    """The other classes lose the same examples as for every method."""
    source = made_up()
    few = source.train.take((source.train.targets != 2).nonzero().squeeze(1)[:100])
    rare = source.train.take((source.train.targets == 2).nonzero().squeeze(1)[:4])
    parts = ([getattr(part, name) for part in (few, rare)] for name in ("inputs", "targets", "ids"))
    small = replace(source, train=Examples(*map(torch.cat, parts)))
    with pytest.raises(ValueError, match="below the 4 training examples of the smallest class, 'c', got 5"):
        biased(small, meta_per_class=5)
    task = biased(small, meta_per_class=5, whole_meta=False)
    assert task.meta.counts(4).tolist() == [5, 5, 0, 5]
    assert task.train.counts(4)[2] == 4
    with pytest.raises(ValueError, match="got 60"):
        biased(small, meta_per_class=60, whole_meta=False)  # no class would be left in the meta set


def test_shapes_by_hand():
    def counts(shape: str) -> list[int]:
        return biased(made_up(), factor=10, shape=shape, meta_per_class=10).train.counts(4).tolist()

    assert counts("exponential") == [50, 23, 10, 5]
    assert counts("step") == [50, 50, 5, 5]
    assert counts("one-large") == [50, 5, 5, 5]
    with pytest.raises(ValueError, match="shape must be one of exponential, step, one-large, got 'steep'"):
        biased(made_up(), shape="steep")


def test_the_corruption_matrix_is_kept():
    assert biased(made_up()).corruption is None
    task = biased(made_up(), noise="flip", rate=0.3)
    off = task.corruption.clone().fill_diagonal_(0)
    assert sorted(off[0].tolist()) == pytest.approx([0, 0, 0, 0.3])
    moved = task.train.targets != task.clean_targets
    # A wrong label is the one class that the matrix sends its true class to.
    assert torch.equal(task.train.targets[moved], off[task.clean_targets[moved]].argmax(1))


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_every_kind_keeps_the_matrix_and_the_truth(kind):
    task = biased(made_up(), noise=kind, rate=0.4)
    assert torch.equal(task.clean_targets, task.train.ids % 4)
    assert task.corruption is not None
    assert task.corruption.shape == (4, 4)
    seen = task.corruption[task.clean_targets, task.train.targets]
    assert (seen > 0).all()
    assert not torch.equal(task.train.targets, task.clean_targets)
    assert torch.equal(task.meta.targets, task.meta.ids % 4)


def test_hierarchical_noise_stays_in_the_group():
    task = biased(made_up(), noise="hierarchical", rate=0.4)
    assert torch.equal(task.train.targets // 2, task.clean_targets // 2)
    with pytest.raises(ValueError, match="digits has none; cifar100 has"):
        biased(load("digits"), noise="hierarchical", rate=0.4)
