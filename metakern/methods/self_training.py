"""Self-training (Yarowsky's bootstrapping): a few clean labels, then the network's own confident ones too."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from metakern.data import Examples
from metakern.methods.method import Method, Setup, no_steps
from metakern.methods.plain_training import predict, train_plainly


def confident(probabilities: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """rows[k] whose largest probability is at least `threshold`, and their classes[k]; probabilities[n, C]."""
    largest, classes = probabilities.max(1)
    rows = (largest >= threshold).nonzero().squeeze(1)
    return rows, classes[rows]


def self_trained(setup: Setup, *, rounds: int = 5, threshold: float = 0.9) -> nn.Module:
    """Train on the meta set; add the training examples that the network is confident of, with its labels; train anew.

    The training labels are not used. The rounds divide the run's steps. Confident examples are chosen afresh in each
    round, so that an early mistake can be corrected; when they no longer change, training ends.
    Source: Yarowsky, "Unsupervised Word Sense Disambiguation Rivaling Supervised Methods", ACL 1995, section 4.
    """
    seeds, pool = setup.task.meta, setup.task.train
    labelled, before = seeds, None
    network = setup.model
    for _ in range(rounds):
        steps = max(1, setup.steps // rounds)
        network = train_plainly(replace(setup, batch_size=min(setup.batch_size, len(labelled))), labelled, steps=steps)
        rows, classes = confident(predict(network, pool.inputs).softmax(1), threshold)
        chosen = torch.full_like(pool.targets, -1).index_copy_(0, rows, classes)
        if before is not None and torch.equal(chosen, before):
            break
        before = chosen
        sure = replace(pool.take(rows), targets=classes)
        parts = seeds, sure
        labelled = Examples(
            torch.cat([part.inputs for part in parts]),
            torch.cat([part.targets for part in parts]),
            torch.cat([part.ids for part in parts]),
        )
    return network


SELF_TRAINING = Method(
    "self-training",
    "the clean set, then the training examples that the network is sure of, with its own labels",
    "Yarowsky, ACL 1995",
    no_steps,
    needs_meta=True,
    handles="both",
    fit=self_trained,
)
