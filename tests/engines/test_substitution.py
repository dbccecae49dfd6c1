"""Parameters that a forward pass does not get from its modules, but from a list, a closure or an object outside."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, gradients, judge_step

PLACES = ("module", "list", "closure", "object", "tied")


class Network(nn.Module):
    """One of its weights is read from `place`."""

    def __init__(self, place: str, normalised: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6) if normalised else nn.Identity()
        self.double()
        weight = self.second.weight
        self.held, self.outside = [weight], SimpleNamespace(weight=weight)
        reads: dict[str, Callable[[], Tensor] | None] = {
            "module": None,
            "list": lambda: self.held[0],
            "closure": lambda: weight,
            "object": lambda: self.outside.weight,
            "tied": lambda: self.again.weight,  # another module's, from the forward pass on
        }
        self.again = nn.Linear(6, 6, bias=False) if place == "tied" else None
        if self.again is not None:
            self.again.weight = weight
        self.read = reads[place]

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        if self.again is not None:
            self.again.weight = self.second.weight
        weight = self.second.weight if self.read is None else self.read()
        return self.head(torch.tanh(F.linear(hidden, weight, self.second.bias)))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_forward_mode(place: str, normalised: bool) -> None:
    batches = inputs.pair(5, 3, 4, classes=3)
    truth = Setup(Network("module", normalised), *batches, interacting=True).oracle()
    judge_step(
        metakern.l2rw_step, Setup(Network(place, normalised), *batches, interacting=True), truth=truth, engine="jvp"
    )


@pytest.mark.parametrize("normalised", [False, True])
def test_penalty_on_what_is_trainable(normalised: bool) -> None:
    """Dual tensors require no gradient, but are asked whether they do."""

    def penalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") + 0.1 * penalty

    model = Network("module", normalised)
    model.first.requires_grad_(False)
    setup = Setup(model, *inputs.pair(5, 3, 4, classes=3), loss_fn=penalised, interacting=True)
    judge_step(metakern.l2rw_step, setup, engine="jvp")


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("place", PLACES[1:])
def test_metabalance(place: str, order: int) -> None:
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    networks = [Network(where, False) for where in ("module", place)]
    for network in networks:
        metakern.metabalance_step(network, batch, meta_batch, inner_lr=0.5, order=order)
    _assert_same(*networks)


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("place", PLACES[1:])
def test_virtual_steps(place: str, memory: str) -> None:
    """By meta records of linear layers ("reuse"), and at a theta^ that is formed."""
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    networks, weights = [Network(where, False) for where in ("module", place)], []
    for network in networks:
        torch.manual_seed(1)
        weight_net = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid()).double()
        optimizer = torch.optim.SGD(weight_net.parameters(), lr=0.5)
        metakern.mwnet_step(
            network, weight_net, batch, meta_batch, weight_optimizer=optimizer, virtual_lr=0.3, memory=memory
        )
        weights.append(torch.cat([p.detach().flatten() for p in weight_net.parameters()]))
    budget.assert_within(weights[1], weights[0], 1.0)
    _assert_same(*networks)


class Stale(nn.Module):
    """Tied to a view of its weight, which was made when the model was."""

    def __init__(self, normalised: bool, beforehand: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 6), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(6) if normalised else nn.Identity()
        self.double()
        self.back = self.first.weight.t() if beforehand else None

    def forward(self, x: Tensor) -> Tensor:
        back = self.first.weight.t() if self.back is None else self.back
        return self.head(F.linear(torch.tanh(self.norm(self.first(x))), back))


@pytest.mark.parametrize("normalised", [False, True])
def test_tensors_made_from_parameters_beforehand_are_refused(normalised: bool) -> None:
    """But for double backward, which replaces no parameter."""
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    model, net = Stale(normalised), nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
    truth = Setup(Stale(normalised, beforehand=False), batch, meta_batch, interacting=True).oracle()
    setup = Setup(model, batch, meta_batch, interacting=True)
    judge_step(metakern.l2rw_step, setup, truth=truth, engine="double_backward")
    before = Snapshot.of(model)
    for engine in ("auto", "jvp"):
        with pytest.raises(NotImplementedError, match=r"parameter 'first\.weight' is used through a tensor"):
            metakern.l2rw_step(model, batch, meta_batch, engine=engine)
    for engine in ("auto", "double_backward"):
        with pytest.raises(NotImplementedError, match=r"first\.weight"):
            metakern.mwnet_step(model, net, batch, meta_batch, weight_optimizer=None, virtual_lr=0.1, engine=engine)
    with pytest.raises(NotImplementedError, match=r"first\.weight"):
        metakern.metabalance_step(model, batch, meta_batch, inner_lr=0.1)
    before.assert_unchanged(model)


def _assert_same(one: nn.Module, other: nn.Module) -> None:
    for left, right in zip(gradients(one).values(), gradients(other).values(), strict=True):
        assert left is not None
        assert right is not None
        budget.assert_within(right, left, 1.0)
