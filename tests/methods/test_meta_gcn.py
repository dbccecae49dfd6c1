"""Meta-GCN: one weight per node, against double differentiation through the virtual step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakern.methods import Setting, find
from metakern.methods.meta_gcn import NodeSettings, node_step
from metakern.testing import budget, oracle


class Averaging(nn.Module):
    """Nodes of a ring of ten: logits are a mean over neighbours, twice; within a sub-graph over those in it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(10, 4, generator=generator, dtype=torch.float64)
        self.first, self.second = nn.Linear(4, 5).double(), nn.Linear(5, 2).double()

    def forward(self, nodes: torch.Tensor, induced: bool = False) -> torch.Tensor:
        apart = (torch.arange(10).unsqueeze(1) - torch.arange(10)).abs()
        near = (torch.minimum(apart, 10 - apart) <= 1).double()
        if induced:
            inside = torch.zeros(10, dtype=torch.float64)
            inside[nodes] = 1
            near = near * inside + torch.eye(10, dtype=torch.float64) * (1 - inside)
        near = near / near.sum(1, keepdim=True)
        return self.second(near @ torch.tanh(self.first(near @ self.features)))[nodes]


@pytest.fixture
def model() -> Averaging:
    torch.manual_seed(0)
    return Averaging()


def test_weights_of_a_step(model):
    nodes, targets = torch.tensor([0, 1, 2, 5, 6]), torch.tensor([0, 1, 0, 1, 1])
    meta_nodes, meta_targets = torch.tensor([3, 4, 8]), torch.tensor([0, 1, 0])
    parameters = list(model.parameters())
    losses = F.cross_entropy(model(nodes), targets, reduction="none")
    meta = torch.autograd.grad(F.cross_entropy(model(meta_nodes, True), meta_targets), parameters)
    dots = torch.stack(
        [
            sum((g * v).sum() for g, v in zip(torch.autograd.grad(loss, parameters, retain_graph=True), meta))
            for loss in losses
        ]
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    setting = Setting(torch.tensor([2, 3]), torch.Generator())
    step = node_step(NodeSettings())
    outcome = step(model, (nodes, targets), (meta_nodes, meta_targets), optimizer=optimizer, setting=setting)
    expected = oracle.clip_normalise(dots)
    assert 0 < int((expected > 0).sum()) < 5, "a case with both kinds of weights"
    budget.assert_within(outcome.weights, expected, 1.0, terms=1000)
    # Not one weight for all, which is what a mean loss makes of the method.
    assert len(outcome.weights[outcome.weights > 0].unique()) > 1


def test_other_data_are_refused(setup):
    with pytest.raises(ValueError, match=r"meta-gcn trains on the nodes of a graph.*take l2rw"):
        find("meta-gcn").begin(setup(nn.Linear(6, 2)))


def test_the_notebooks_direction_and_the_whole_graph(model):
    batch = torch.tensor([0, 1, 2, 5]), torch.tensor([0, 1, 0, 1])
    meta_batch = torch.tensor([3, 4, 8]), torch.tensor([0, 1, 0])
    setting = Setting(torch.tensor([2, 2]), torch.Generator())
    found = []
    for settings in (NodeSettings(), NodeSettings(preconditioned=True), NodeSettings(induced=False)):
        own = copy.deepcopy(model)
        optimizer = torch.optim.Adam(own.parameters(), 0.01)
        step = node_step(settings)
        found.append([step(own, batch, meta_batch, optimizer=optimizer, setting=setting) for _ in range(3)])
    plain, notebook, whole = found
    # Adam's moments are empty at first: its direction is then that of the gradient.
    budget.assert_within(notebook[0].weights, plain[0].weights, 1.0, terms=1000)
    assert not torch.allclose(notebook[2].weights, plain[2].weights)
    assert whole[0].meta_loss != plain[0].meta_loss
