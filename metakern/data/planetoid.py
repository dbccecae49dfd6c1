"""Citation graphs with the public split: Cora and CiteSeer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metakern.data.folder import data_dir as find_data_dir
from metakern.data.folder import find_file
from metakern.data.pickled import SparseRows, read_pickled

GRAPHS = ("cora", "citeseer")
VALIDATION = 500  # nodes, those behind the training nodes


@dataclass(frozen=True)
class Graph:
    """features[N, F] float32, edges[2, E] int64 in both directions, targets[N] int64, -1 for nodes without a label.

    train, validation and test are node numbers, int64, which do not overlap.
    """

    name: str
    features: Tensor
    edges: Tensor
    targets: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def load_graph(name: str, data_dir: str | Path | None = None) -> Graph:
    """A graph of GRAPHS from `{name}.npz` or the published `ind.{name}.*`; features are binary words, not normalised.

    The archive holds CSR features (x_indptr, x_indices, x_shape; every value 1), edge_index, y, train_idx, val_idx and
    test_idx. The published files are pickles, of which nothing is run, see `read_pickled`.
    Raises: ValueError for another name and for files that are not of that form, DataNotFound when they are missing.
    Source: Yang, Cohen, Salakhutdinov, "Revisiting Semi-Supervised Learning with Graph Embeddings", ICML 2016.
    """
    if name not in GRAPHS:
        raise ValueError(f"unknown graph {name!r}; there are: {', '.join(GRAPHS)}")
    path = find_file(
        find_data_dir(data_dir),
        ("planetoid", "."),
        (f"{name}.npz", f"ind.{name}.allx"),
        data=name,
        form=f"npz (x_indptr, x_indices, x_shape, edge_index, y, train_idx, val_idx, test_idx), or as published: "
        f"ind.{name}.allx, .ally, .tx, .ty, .y, .graph and .test.index",
        published="https://github.com/kimiyoung/planetoid",
    )
    if path.suffix != ".npz":
        return _published(name, path.with_suffix(""))
    with np.load(path, allow_pickle=False) as stored:
        lengths = np.diff(stored["x_indptr"])
        features = torch.zeros(tuple(int(size) for size in stored["x_shape"]))
        rows = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        features[rows, torch.from_numpy(stored["x_indices"].astype(np.int64))] = 1
        keys = ("edge_index", "y", "train_idx", "val_idx", "test_idx")
        return Graph(name, features, *(torch.from_numpy(stored[key].astype(np.int64)) for key in keys))


def _published(name: str, stem: Path) -> Graph:
    """A graph from `ind.{name}.*`. Rows are nodes in order, except test nodes, whose numbers are in test.index.

    Numbers that are missing there are nodes without words, label and edges.
    """
    allx, tx = (_read(stem, part, SparseRows) for part in ("allx", "tx"))
    ally, ty, y = (_read(stem, part, np.ndarray) for part in ("ally", "ty", "y"))
    neighbours = _read(stem, "graph", dict)
    test = np.array(_of(stem, "test.index").read_text().split(), np.int64)
    nodes = int(test.max()) + 1
    features, targets = np.zeros((nodes, allx.shape[1]), np.float32), np.full(nodes, -1)
    for rows, words, labels in ((np.arange(len(ally)), allx, ally), (test, tx, ty)):
        features[np.repeat(rows, np.diff(words.indptr)), words.indices] = words.data
        targets[rows] = np.where(labels.any(1), labels.argmax(1), -1)
    pairs = np.array([(node, other) for node, others in neighbours.items() for other in others if node != other])
    edges = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0).T
    train, validation = np.arange(len(y)), np.arange(len(y), len(y) + VALIDATION)
    return Graph(name, *map(torch.from_numpy, (features, edges.copy(), targets, train, validation, np.sort(test))))


def _read(stem: Path, part: str, kind: type) -> Any:
    found = read_pickled(_of(stem, part))
    if not isinstance(found, kind):
        wanted = "a CSR matrix" if kind is SparseRows else f"a {kind.__name__}"
        raise ValueError(
            f"{_of(stem, part)} must hold {wanted}, as the published file does; got {type(found).__name__}"
        )
    return found


def _of(stem: Path, part: str) -> Path:
    return stem.with_name(f"{stem.name}.{part}")
