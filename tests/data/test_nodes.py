"""Node tasks on a made-up graph: the public split is kept, and nothing of it leaks."""

import numpy as np
import pytest
import torch

from metakern.data import GraphSource, load, node_task


@pytest.fixture
def source(tmp_path) -> GraphSource:
    """60 nodes on a ring in three classes, the class of node k being k % 3."""
    nodes = np.arange(60)
    np.savez(
        tmp_path / "cora.npz",
        x_indptr=np.arange(61),
        x_indices=nodes % 5,
        x_shape=np.array([60, 5]),
        edge_index=np.stack([np.concatenate([nodes, (nodes + 1) % 60]), np.concatenate([(nodes + 1) % 60, nodes])]),
        y=nodes % 3,
        train_idx=np.arange(0, 30),
        val_idx=np.arange(30, 45),
        test_idx=np.arange(45, 60),
    )
    found = load("cora", tmp_path)
    assert isinstance(found, GraphSource)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_split_is_kept(source, seed):
    task = node_task(source, factor=5, meta_per_class=4, seed=seed)
    assert task.train.counts(3).tolist() == [10, 2, 2]
    assert task.meta.counts(3).tolist() == [4, 4, 4]
    assert set(task.train.ids.tolist()) <= set(range(30))
    assert set(task.meta.ids.tolist()) <= set(range(30, 45))
    assert task.test.ids.tolist() == list(range(45, 60))
    for part in (task.train, task.meta, task.test):
        assert torch.equal(part.targets, part.ids % 3)
        assert torch.equal(part.inputs, part.ids)


def test_seeded(source):
    first, again, other = (node_task(source, factor=5, meta_per_class=2, seed=seed).train.ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_refusals(source):
    with pytest.raises(ValueError, match="must be 1 to 5, the validation nodes of the smallest class, got 6"):
        node_task(source, meta_per_class=6)
    with pytest.raises(ValueError, match="shape must be one of exponential, step, one-large, got 'steep'"):
        node_task(source, shape="steep")
