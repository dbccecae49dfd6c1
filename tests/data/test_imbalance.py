import os

import pytest
import torch

from metakern.data import Examples, Source, Task, binary_imbalance, load


def made_up(minority: int, majority: int, classes: tuple[str, ...] = ("few", "many")) -> Source:
    n = minority + majority
    targets = torch.tensor([0] * minority + [1] * majority)[
        torch.randperm(n, generator=torch.Generator().manual_seed(1))
    ]
    examples = Examples(torch.randn(n, 3), targets, torch.arange(n) + 1000)
    test = Examples(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]), torch.arange(4))
    return Source("made-up", examples, test, classes)


def ids(examples: Examples) -> set[int]:
    return set(examples.ids.tolist())


@pytest.mark.parametrize("majority", [0.5, 0.9, 0.95, 0.98, 0.99, 0.995])
def test_shares_and_sizes(majority):
    task = binary_imbalance(made_up(3000, 6000), majority=majority)
    drawn = task.train.counts(2) + task.meta.counts(2)
    assert drawn.tolist() == [5000 - round(5000 * majority), round(5000 * majority)]
    assert task.meta.counts(2).tolist() == [5, 5]


@pytest.mark.parametrize("seed", range(3))
def test_no_leakage(seed):
    source = made_up(300, 3000)
    task = binary_imbalance(source, majority=0.95, size=1000, seed=seed)
    assert not ids(task.train) & ids(task.meta)
    assert len(ids(task.train)) == len(task.train)
    assert len(ids(task.meta)) == len(task.meta)
    assert ids(task.train) | ids(task.meta) <= ids(source.train)
    assert torch.equal(task.test.ids, source.test.ids)
    lookup = {int(row): value for row, value in zip(source.train.ids, source.train.inputs, strict=True)}
    for examples in (task.train, task.meta):
        assert all(
            torch.equal(lookup[int(row)], value) for row, value in zip(examples.ids, examples.inputs, strict=True)
        )


def test_seeded():
    def drawn(seed: int) -> Task:
        return binary_imbalance(made_up(300, 3000), majority=0.9, size=500, seed=seed)

    assert torch.equal(drawn(3).train.ids, drawn(3).train.ids)
    assert torch.equal(drawn(3).meta.ids, drawn(3).meta.ids)
    assert not torch.equal(drawn(3).train.ids, drawn(4).train.ids)


@pytest.mark.parametrize("noise", ["uniform", "symmetric", "flip", "background"])
def test_noise_spoils_the_training_labels_alone(noise):
    source = made_up(300, 3000)
    clean = binary_imbalance(source, majority=0.9, size=500, seed=2)
    task = binary_imbalance(source, majority=0.9, size=500, seed=2, noise=noise, rate=0.4)
    assert task.name == f"made-up at majority 0.9, 40 % {noise} noise"
    for ours, theirs in ((task.train, clean.train), (task.meta, clean.meta), (task.test, clean.test)):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(task.meta.targets, clean.meta.targets)
    assert torch.equal(task.test.targets, clean.test.targets)
    assert torch.equal(task.clean_targets, clean.train.targets)
    assert clean.corruption is None
    assert (task.corruption[task.clean_targets, task.train.targets] > 0).all()
    assert not torch.equal(task.train.targets, task.clean_targets)


def test_noise_of_more_classes_is_refused():
    with pytest.raises(ValueError, match="partners must be 1 to 1 for 2 classes, got 2"):
        binary_imbalance(made_up(30, 300), noise="flip2", rate=0.4)
    with pytest.raises(ValueError, match="hierarchical noise stays in groups of classes"):
        binary_imbalance(made_up(30, 300), noise="hierarchical", rate=0.4)


def test_small_source_shrinks_the_size_not_the_share():
    task = binary_imbalance(made_up(100, 900), majority=0.9)
    assert (task.train.counts(2) + task.meta.counts(2)).tolist() == [100, 900]


@pytest.mark.parametrize("majority", [0.9, 0.995])
def test_digits_allow_every_share_nearly(majority):
    task = binary_imbalance(load("digits-4v9"), majority=majority)
    assert task.meta.counts(2).tolist() == [5, 5]
    assert int(task.train.counts(2)[0]) >= 1
    assert abs(float(task.class_shares[1]) - majority) < 0.04
    assert not (ids(task.train) | ids(task.meta)) & ids(task.test)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"majority": 1.0}, "majority"),
        ({"majority": 0.2}, "majority"),
        ({"meta_per_class": 0}, "meta_per_class"),
        ({"meta_per_class": 30}, "smaller class's 30"),
    ],
)
def test_refusals(keywords, message):
    with pytest.raises(ValueError, match=message):
        binary_imbalance(made_up(30, 300), **keywords)


def test_refuses_ten_classes():
    with pytest.raises(ValueError, match="2 classes"):
        binary_imbalance(load("digits"))


@pytest.mark.skipif("METAKERN_DATA" not in os.environ, reason="METAKERN_DATA names no folder: real MNIST not tested")
def test_real_mnist_4v9():
    task = binary_imbalance(load("mnist-4v9"), majority=0.995, seed=0)
    assert task.train.counts(2).tolist() == [20, 4970]
    assert task.test.counts(2).tolist() == [982, 1009]
