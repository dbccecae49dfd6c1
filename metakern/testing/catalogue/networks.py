"""Whole networks, small: slower than the rest of the catalogue, so each is run a few times only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.testing import inputs
from metakern.testing.catalogue.case import Case, Setup, model_case, randomise
from metakern.testing.models import Transformer, lenet
from metakern.testing.networks import GraphNetwork, convnext, resnet


def _batch_norm(n: int, m: int) -> Setup:
    torch.manual_seed(0)
    model = resnet(32, 4, 3)
    return Setup(model.double(), *inputs.pair(n, m, 3, 8, 8, classes=3, seed=3), interacting=True)


def _transformer(n: int, m: int) -> Setup:
    torch.manual_seed(0)
    model = Transformer(width=8, depth=2, heads=2, classes=3, vocabulary=11, fused=True)
    randomise(model)
    batch, meta_batch = (
        (inputs.labels(size, 6, classes=11, seed=seed), inputs.labels(size, classes=3, seed=seed + 1))
        for size, seed in ((n, 3), (m, 5))
    )
    return Setup(model.double(), batch, meta_batch)


def _graph(n: int, m: int) -> Setup:
    """Train and meta nodes of one graph of twenty; every node sees its neighbours."""
    torch.manual_seed(0)
    nodes = 20
    model = GraphNetwork(inputs.labels(2, 3 * nodes, classes=nodes, seed=5), nodes, 6, hidden=5).double()
    features = inputs.normal(nodes, 6, seed=6)

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(features)[batch[0]], batch[1], reduction="none")

    order = torch.arange(nodes).roll(7)
    train, meta = order[:n], order[n : n + m]
    batch, meta_batch = ((chosen, inputs.labels(len(chosen), classes=3, seed=8)) for chosen in (train, meta))
    return Setup(model, batch, meta_batch, loss_fn=losses, interacting=True)


SEES_OTHERS: dict[str, Any] = {"ghost": "refuse", "jvp": "exact"}

NETWORKS: list[Case] = [
    model_case("lenet", lambda: lenet(3, (4, 4, 8), 10), 1, 28, 28),
    model_case("resnet-32-group-norm", lambda: resnet(32, 4, 3, lambda width: nn.GroupNorm(2, width)), 3, 8, 8),
    model_case("resnet-32-batch-norm-eval", lambda: resnet(32, 4, 3).eval(), 3, 8, 8),
    Case("resnet-32-batch-norm-train", _batch_norm, **SEES_OTHERS),
    model_case("convnext", lambda: convnext(8, (1, 1), 3), 3, 8, 8),
    Case("transformer", _transformer),
    Case("graph-network", _graph, **SEES_OTHERS),
]
