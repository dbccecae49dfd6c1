"""Every method that can be named runs on texts, on rows of numbers and on a graph, or says that such data are not for
it; on a GPU as well."""

from dataclasses import replace

import pytest
import torch

from metakern.data import Examples, Graph, NodeTask, Task
from metakern.methods import METHODS
from metakern.methods.feature_resampling import RESAMPLING_METHODS
from metakern.methods.method import NotApplicable
from metakern.trainers import train

NEED_NUMBERS = {
    *("proportion-as-shipped", "cmw-net-sl", "metabalance", "metabalance-as-shipped", "smote", "borderline-smote"),
    *("svm-smote", "adasyn", "cluster-centroids", "near-miss", "all-knn", "smote-enn", "adaboost", "mixup", "m2m"),
}

RESAMPLED = {"metabalance", "metabalance-as-shipped", *(method.name for method in RESAMPLING_METHODS)}

NOT_FOR = {
    "texts": NEED_NUMBERS | {"meta-gcn"},
    "rows": {"proportion-as-shipped", "meta-gcn"},
    "nodes": NEED_NUMBERS,
}


def texts() -> Task:
    tokens = torch.randint(1, 20, (60, 5), generator=torch.Generator().manual_seed(0))
    examples = Examples(tokens, torch.arange(60) % 3, torch.arange(60))
    return Task("texts", examples, examples.take(torch.arange(30)), examples, ("a", "b", "c"), examples.targets)


def rows() -> Task:
    inputs = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    examples = Examples(inputs, torch.arange(60) % 3, torch.arange(60))
    return Task("rows", examples, examples.take(torch.arange(30)), examples, ("a", "b", "c"), examples.targets)


def nodes() -> Task:
    every = torch.arange(24)
    edges = torch.stack([every, every.roll(1)])
    graph = Graph("ring", torch.eye(24), edges, every % 3, every[:12], every[12:18], every[18:])
    train, meta, test = (Examples(part, part % 3, part) for part in (every[:12], every[12:18], every[18:]))
    return NodeTask("ring", train, meta, test, ("a", "b", "c"), train.targets, graph=graph)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("made", [texts, rows, nodes])
@pytest.mark.parametrize("method", METHODS)
def test_runs_or_says_why_not(quick, tmp_path, method, made, device):
    config = replace(quick, method=method, data=made.__name__, majority=None, steps=2, batch_size=6, evaluations=1)
    refused = method in NOT_FOR[made.__name__]
    if method in RESAMPLED and not refused:
        pytest.importorskip("imblearn", reason="imbalanced-learn is not installed")
    if refused:
        with pytest.raises(NotApplicable):
            train(replace(config, device=device), tmp_path, task=made(), progress=False)
    else:
        assert train(replace(config, device=device), tmp_path, task=made(), progress=False).errors.test >= 0
