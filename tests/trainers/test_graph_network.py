"""The graph network against its equation on the whole adjacency matrix."""

import pytest
import torch

from metakern.data import Graph
from metakern.testing import budget, inputs
from metakern.trainers.graph_network import GraphConvolution


@pytest.fixture
def graph() -> Graph:
    upper = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)).triu(1) > 0.7
    edges = (upper | upper.t()).nonzero().t()
    words = (inputs.normal(12, 7) > 0).float()
    nodes = torch.arange(12)
    return Graph("made-up", words, edges, nodes % 2, nodes[:4], nodes[4:8], nodes[8:])


def expected(model: GraphConvolution, graph: Graph, edges: torch.Tensor) -> torch.Tensor:
    adjacency = torch.eye(12, dtype=torch.float64)
    adjacency[edges[1], edges[0]] = 1
    scale = adjacency.sum(1).rsqrt().diag()
    spread = scale @ adjacency @ scale
    features = graph.features.double() / graph.features.double().sum(1, keepdim=True).clamp(min=1)
    return model.second(torch.relu(model.first(spread @ features)).T.matmul(spread.T).T)


def test_logits_are_the_equation(graph):
    torch.manual_seed(0)
    model = GraphConvolution(graph, 2).double().eval()
    nodes = torch.tensor([3, 9, 3, 0])
    # The adjacency was normalised in float32.
    for found, edges in (
        (model(nodes), graph.edges),
        (model(nodes, True), graph.edges[:, torch.isin(graph.edges, nodes).all(0)]),
    ):
        wanted = expected(model, graph, edges)[nodes]
        budget.assert_within(found.detach().float(), wanted.detach(), wanted.detach().abs().max(), terms=100)


def test_constants_follow_the_model(graph):
    model = GraphConvolution(graph, 2).double()
    assert model.smoothed.dtype == torch.float64
    assert model.edges.dtype == torch.int64
    assert not list(model.buffers())
