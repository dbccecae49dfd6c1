"""Citation graphs with the public split: Cora and CiteSeer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metakern.data.folder import data_dir as find_data_dir
from metakern.data.folder import find_file

GRAPHS = ("cora", "citeseer")


@dataclass(frozen=True)
class Graph:
    """features[N, F] float32, edges[2, E] int64 in both directions, targets[N] int64 with -1 for nodes without label.

    train, validation and test are node numbers, int64; they share none.
    """

    name: str
    features: Tensor
    edges: Tensor
    targets: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def load_graph(name: str, data_dir: str | Path | None = None) -> Graph:
    """A graph of GRAPHS from `{name}.npz`; features are the published binary words, not normalised.

    The archive holds CSR features (x_indptr, x_indices, x_shape; every value 1), edge_index, y, train_idx, val_idx and
    test_idx, made from the public `ind.*` files by the usual rule; those are pickles, which can run code: not read.
    Raises: ValueError for another name, DataNotFound when the file is missing.
    Source: Yang, Cohen, Salakhutdinov, "Revisiting Semi-Supervised Learning with Graph Embeddings", ICML 2016.
    """
    if name not in GRAPHS:
        raise ValueError(f"unknown graph {name!r}; there are: {', '.join(GRAPHS)}")
    path = find_file(
        find_data_dir(data_dir),
        ("planetoid", "."),
        (f"{name}.npz",),
        data=name,
        form="npz: x_indptr, x_indices, x_shape, edge_index, y, train_idx, val_idx, test_idx",
        published="https://github.com/kimiyoung/planetoid (as pickles)",
    )
    with np.load(path, allow_pickle=False) as stored:
        lengths = np.diff(stored["x_indptr"])
        features = torch.zeros(tuple(int(size) for size in stored["x_shape"]))
        rows = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        features[rows, torch.from_numpy(stored["x_indices"].astype(np.int64))] = 1
        keys = ("edge_index", "y", "train_idx", "val_idx", "test_idx")
        return Graph(name, features, *(torch.from_numpy(stored[key].astype(np.int64)) for key in keys))
