"""Loss curves: the loss of every training example over the epochs of a plain training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.data import Examples
from metakern.methods.method import Setup
from metakern.methods.plain_training import predict, train_plainly


class Phase(NamedTuple):
    """Epochs of a probing run with the same batch size; `rate(epoch)` is a factor of the run's learning rate."""

    epochs: int
    batch_size: int
    rate: Callable[[int], float] = lambda epoch: 1.0


@torch.no_grad()
def example_losses(model: nn.Module, examples: Examples) -> Tensor:
    """Cross entropy of each example in evaluation mode, [n]."""
    return F.cross_entropy(predict(model, examples.inputs), examples.targets, reduction="none")


def lowest_losses(model: nn.Module, examples: Examples, most: int) -> Tensor:
    """The rows of lowest loss of each class, on the CPU: `most` of each, or half of the smallest class if that is less.

    Source: the meta set of Shu et al., "CMW-Net", TPAMI 2023, for noisy labels, by its code.
    """
    order = example_losses(model, examples).cpu().argsort(stable=True)
    ranked = examples.targets.cpu()[order]
    classes, counts = ranked.unique(return_counts=True)
    each = max(1, min(most, int(counts.min()) // 2))
    return torch.cat([order[ranked == c][:each] for c in classes])


def probe(setup: Setup, phases: Sequence[Phase]) -> Tensor:
    """Losses[N, T] of the N training examples after each of the T epochs of a plain run through `phases`.

    The run starts from the model's initial parameters; the model itself is not changed. Each phase starts with a new
    optimizer state.
    """
    train, curves = setup.task.train, []
    for phase in phases:
        per_epoch = max(1, round(len(train) / phase.batch_size))

        def record(k: int, network: nn.Module, per_epoch: int = per_epoch) -> None:
            if k % per_epoch == 0:
                curves.append(example_losses(network, train))

        network = train_plainly(
            setup,
            train,
            steps=phase.epochs * per_epoch,
            batch_size=phase.batch_size,
            after_step=record,
            rate=lambda k, phase=phase, per_epoch=per_epoch: phase.rate((k - 1) // per_epoch),
        )
        setup = replace(setup, model=network)
    return torch.stack(curves, 1)


def class_centred(curves: Tensor, targets: Tensor, classes: int) -> Tensor:
    """I_n = L_n - mean of L over the examples with the label of n; curves[N, T], targets[N] -> [N, T].

    This distinguishes an example from others of the same label: if its label is wrong, its loss is above theirs from
    the start.
    Source: Jiang et al., "Delving into Sample Loss Curve to Embrace Noisy and Imbalanced Data", AAAI 2022.
    """
    sums = curves.new_zeros(classes, curves.shape[1]).index_add_(0, targets, curves)
    means = sums / torch.bincount(targets, minlength=classes).clamp(min=1).unsqueeze(1)
    return curves - means[targets]
