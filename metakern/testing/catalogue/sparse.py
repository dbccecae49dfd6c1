"""Sparse data: features of examples, and the edges of a graph, as coordinates (COO) or rows (CSR)."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.testing import inputs
from metakern.testing.catalogue.case import Case, Setup, randomise


class SparseFeatures(nn.Module):
    """Sparse examples meet a linear layer, and a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.matrix, self.head = nn.Linear(9, 6), nn.Parameter(torch.randn(9, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x) + (x @ self.matrix).square()))


class SparseGraph(nn.Module):
    """Graph convolutions: a sparse adjacency matrix times the features of the nodes."""

    def __init__(self, edges: Tensor) -> None:
        super().__init__()
        self.edges: Tensor
        self.register_buffer("edges", edges)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.edges, self.second(torch.tanh(self.edges @ self.first(x))))


def _features(layout: torch.layout, n: int, m: int) -> Setup:
    torch.manual_seed(0)
    model = SparseFeatures()
    randomise(model)
    pair = inputs.pair(n, m, 9, classes=3, seed=11)
    batch, meta_batch = ((x.clamp_min(0).to_sparse(layout=layout), targets) for x, targets in pair)

    def row(batch: tuple[Tensor, Tensor], n: int) -> Any:
        return batch[0].to_dense()[n : n + 1].to_sparse(layout=layout), batch[1][n : n + 1]

    return Setup(model.double(), batch, meta_batch, select=row)


def _graph(layout: torch.layout, n: int, m: int) -> Setup:
    """Train and meta nodes of one graph of twelve."""
    torch.manual_seed(0)
    nodes = 12
    edges = torch.eye(nodes) + (inputs.normal(nodes, nodes, seed=4, dtype=torch.float32) > 0.8)
    model = SparseGraph((edges / edges.sum(1, keepdim=True)).to_sparse(layout=layout))
    features = inputs.normal(nodes, 4, seed=6)

    def losses(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(features.to(model.first.weight))[batch[0]], batch[1], reduction="none")

    chosen = torch.arange(n), torch.arange(nodes - m, nodes)
    batch, meta_batch = ((nodes, inputs.labels(len(nodes), classes=3, seed=8)) for nodes in chosen)
    return Setup(model.double(), batch, meta_batch, loss_fn=losses, interacting=True)


SPARSE: list[Case] = [
    Case("sparse-features", partial(_features, torch.sparse_coo), jvp="exact"),
    Case("sparse-features-rows", partial(_features, torch.sparse_csr), jvp="exact"),
    Case("sparse-graph", partial(_graph, torch.sparse_coo), ghost="refuse", jvp="exact"),
    Case("sparse-graph-rows", partial(_graph, torch.sparse_csr), ghost="refuse", jvp="exact"),
]
