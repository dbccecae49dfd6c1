"""Re-sampling: each method against imbalanced-learn on the same features, and what becomes of ids and true labels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metakern.data import Examples, Task
from metakern.methods import find
from metakern.methods.feature_resampling import RESAMPLING_METHODS

SMOTE = pytest.importorskip("imblearn.over_sampling", reason="imbalanced-learn is not installed").SMOTE


@pytest.fixture
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.arange(120) % 6 != 0).long()  # 20 of class 0, 100 of class 1
    inputs = torch.randn(120, 1, 2, 3, generator=generator) + 1.5 * targets.view(-1, 1, 1, 1)
    train = Examples(inputs, targets, torch.arange(1000, 1120))
    return Task("made-up", train, train, train, ("a", "b"), 1 - targets)


@pytest.mark.parametrize("name", [method.name for method in RESAMPLING_METHODS])
def test_every_sampler(name, task):
    changed = find(name).training_set(task, 0)
    again = find(name).training_set(task, 0)
    assert torch.equal(changed.train.inputs, again.train.inputs)
    assert changed.train.inputs.shape[1:] == (1, 2, 3)
    assert changed.train.inputs.dtype == torch.float32
    counts = changed.train.counts(2).tolist()
    assert max(counts) / min(counts) < 5
    known = changed.train.ids >= 0
    rows = changed.train.ids[known] - 1000
    assert torch.equal(changed.train.inputs[known], task.train.inputs[rows])
    assert torch.equal(changed.clean_targets[known], task.clean_targets[rows])
    assert torch.equal(changed.clean_targets[~known], changed.train.targets[~known])
    assert len(changed.clean_targets) == len(changed.train)
    synthetic = not name.endswith("sample") and name not in ("near-miss", "all-knn")
    assert bool((~known).any()) == synthetic


def test_smote_is_the_librarys(task):
    flat, labels = task.train.inputs.flatten(1).numpy(), task.train.targets.numpy()
    expected, _ = SMOTE(k_neighbors=5, random_state=3).fit_resample(flat, labels)
    ours = find("smote").training_set(task, 3).train.inputs.flatten(1)
    np.testing.assert_array_equal(ours.numpy(), np.asarray(expected))


def test_smote_puts_points_between_neighbours(task):
    """By hand: two examples of the smaller class, so every new point lies on the line between them."""
    inputs = torch.tensor([[0.0, 0.0], [1.0, 2.0], [9.0, 9.0], [8.0, 9.0], [9.0, 8.0], [8.0, 8.0]])
    train = Examples(inputs, torch.tensor([0, 0, 1, 1, 1, 1]), torch.arange(6))
    small = replace(task, train=train, clean_targets=train.targets)
    made = find("smote").training_set(small, 0).train
    new = made.inputs[made.ids < 0]
    assert len(new) == 2
    torch.testing.assert_close(new[:, 1], 2 * new[:, 0])
    assert ((new[:, 0] >= 0) & (new[:, 0] <= 1)).all()


def test_tokens_are_refused(task):
    tokens = replace(task.train, inputs=torch.zeros(120, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="re-sampling needs inputs that are numbers"):
        find("smote").training_set(replace(task, train=tokens), 0)


@pytest.mark.parametrize(("name", "size"), [("oversample", 100), ("undersample", 20)])
def test_copies_of_tokens_and_nodes(task, name, size):
    for inputs in (torch.arange(600).view(120, 5), torch.arange(120)):
        tokens = replace(task, train=replace(task.train, inputs=inputs))
        changed = find(name).training_set(tokens, 0).train
        assert changed.counts(2).tolist() == [size, size]
        assert torch.equal(changed.inputs, inputs[changed.ids - 1000])


def test_a_class_of_one_is_refused_with_the_samplers_name(task):
    one = task.train.take(torch.cat([torch.tensor([0]), (task.train.targets == 1).nonzero().squeeze(1)]))
    with pytest.raises(ValueError, match="SMOTE on made-up: "):
        find("smote").training_set(replace(task, train=one), 0)
