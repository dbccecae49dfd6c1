"""The graph convolutional network for node tasks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from metakern.data import Graph


class GraphConvolution(nn.Module):
    """nodes[n] int64 -> logits[n, C]: h = relu(S X W1 + b1), logits = S dropout(h) W2 + b2, at the given nodes.

    S = D^-1/2 (A + I) D^-1/2, D the row sums of A + I; X the features, each row divided by its sum. h is computed only
    at the neighbours of the given nodes, since no other node influences them through two layers.
    Source: Kipf, Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017, equation 9.
    """

    def __init__(self, graph: Graph, classes: int, *, hidden: int = 64, dropout: float = 0.5) -> None:
        super().__init__()
        nodes, words = graph.features.shape
        self.first, self.second = nn.Linear(words, hidden), nn.Linear(hidden, classes)
        self.dropout = nn.Dropout(dropout)
        edges = torch.cat([graph.edges, torch.arange(nodes).expand(2, -1)], 1)
        features = graph.features / graph.features.sum(1, keepdim=True).clamp(min=1)
        shares = _shares(edges, nodes)
        smoothed = torch.sparse_coo_tensor(edges.flip(0), shares, (nodes, nodes), check_invariants=False) @ features
        # No buffers: a step keeps copies of those, and these never change.
        self.edges, self.shares, self.features, self.smoothed = edges, shares, features, smoothed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraphConvolution:
        super()._apply(fn, recurse)
        for name in ("edges", "shares", "features", "smoothed"):
            setattr(self, name, fn(getattr(self, name)))
        return self

    def forward(self, nodes: Tensor, induced: bool = False) -> Tensor:
        """Logits of `nodes`; with `induced`, the graph consists of these nodes and the edges between them."""
        own, place = nodes.unique(return_inverse=True)
        inputs, spread = self._induced(own) if induced else self._whole(own)
        hidden = self.dropout(torch.relu(self.first(inputs)))
        return self.second(spread[place] @ hidden)

    def _whole(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """S X at the neighbours of `nodes`, [s, words], and S from the neighbours to the nodes, [n, s]."""
        into = torch.isin(self.edges[1], nodes)
        edges, shares = self.edges[:, into], self.shares[into]
        neighbours = edges[0].unique()
        return self.smoothed[neighbours], _dense(edges, shares, neighbours, nodes)

    def _induced(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """S X and S of the graph of `nodes` alone, [n, words] and [n, n]."""
        edges = self.edges[:, torch.isin(self.edges, nodes).all(0)]
        spread = _dense(edges, _shares(edges, len(self.features)).to(self.shares), nodes, nodes)
        return spread @ self.features[nodes], spread


def _shares(edges: Tensor, nodes: int) -> Tensor:
    """S at each of edges[2, E], [E]."""
    scale = torch.bincount(edges[1], minlength=nodes).clamp(min=1).float().rsqrt()
    return scale[edges[0]] * scale[edges[1]]


def _dense(edges: Tensor, shares: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Shares as a matrix [targets, sources]; both are sorted and hold every end of the edges."""
    matrix = shares.new_zeros(len(targets), len(sources))
    matrix[torch.searchsorted(targets, edges[1]), torch.searchsorted(sources, edges[0])] = shares
    return matrix
