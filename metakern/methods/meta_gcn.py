"""Meta-GCN: learning to reweight the training nodes of a graph by a small balanced set of validation nodes.

As a composition: the meta pass on the induced sub-graph -> dots of the node losses by forward mode -> clip and
normalise -> weighted gradient -> step. This is `metakern.reweight_step`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.data import NodeTask
from metakern.methods.method import Batch, Method, NotApplicable, Outcome, Setting, Setup, Step
from metakern.methods.weight_net_step import virtual_rule
from metakern.step.direction import preconditioned


def node_losses(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of each node, [n]; batch = (nodes[n], targets[n], whether to use only edges between these)."""
    nodes, targets, induced = batch
    return F.cross_entropy(model(nodes, induced), targets, reduction="none")


@dataclass(frozen=True)
class NodeSettings:
    """Settings; the defaults are the paper's.

    induced: the meta nodes form a graph of their own; otherwise their neighbours in the whole graph count as well.
    preconditioned: the dots are taken along the update of the run's optimizer, as in the authors' notebook, whose
    optimizer is Adam.
    """

    induced: bool = True
    preconditioned: bool = False


def node_step(settings: NodeSettings) -> Step:
    """The step of Meta-GCN, which keeps no state between calls."""

    def step(
        model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        """w_n = max(<grad l_n, grad L_meta>, 0) / (sum + [sum == 0]), L_meta on the sub-graph of the meta nodes.

        Source: Mohammadizadeh et al., "Meta-GCN", 2024, algorithm 1.
        """
        result = metakern.reweight_step(
            model,
            (*batch, False),
            (*meta_batch, settings.induced),
            direction=preconditioned(model, optimizer, virtual_rule(optimizer)) if settings.preconditioned else None,
            loss_fn=node_losses,
            optimizer=optimizer,
            # Nodes with neighbours in common interact: "auto" would find that out by a proof, and take forward mode.
            engine="jvp" if setting.engine == "auto" else setting.engine,
        )
        return Outcome(result.weights, result.losses, result.meta_loss)

    return step


def meta_gcn(settings: NodeSettings) -> Method:
    """Meta-GCN with the given settings."""

    def begin(setup: Setup) -> Step:
        """Raises: NotApplicable for a task that is no graph."""
        if not isinstance(setup.task, NodeTask):
            raise NotApplicable(
                f"meta-gcn trains on the nodes of a graph, as in --data cora; for {setup.task.name} take l2rw"
            )
        return node_step(settings)

    return Method(
        "meta-gcn",
        "l2rw for the nodes of a graph, whose meta nodes are a graph of their own",
        "Mohammadizadeh et al., 2024",
        begin,
        steps=1000,
        batch_size=200,
        needs_meta=True,
        settings=settings,
        rebuilt=meta_gcn,
    )


META_GCN = meta_gcn(NodeSettings())
