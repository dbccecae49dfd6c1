"""How well a model does on test examples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from metakern.data import Examples


class Errors(NamedTuple):
    """Errors in percent: over all examples, the mean over classes, and of each class."""

    test: float
    balanced: float
    by_class: list[float]


@torch.no_grad()
def measure_errors(model: nn.Module, examples: Examples, classes: int, *, batch_size: int = 500) -> Errors:
    """The share of `examples` whose largest logit is not their target's; the model is left in its former mode."""
    was_training = model.training
    model.eval()
    wrong = torch.cat(
        [
            model(inputs).argmax(1) != targets
            for inputs, targets in zip(
                examples.inputs.split(batch_size), examples.targets.split(batch_size), strict=True
            )
        ]
    ).double()
    model.train(was_training)
    by_class = [100 * wrong[examples.targets == target].mean().item() for target in range(classes)]
    return Errors(100 * wrong.mean().item(), sum(by_class) / classes, by_class)
