"""How well a model does on test examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from metakern.data import Examples


class Errors(NamedTuple):
    """Errors in percent: over all examples, the mean over classes, and of each; a class not tested is nan."""

    test: float
    balanced: float
    by_class: list[float]

    def columns(self, class_names: Sequence[str]) -> dict[str, float]:
        """What a table shows: each class where there are two, the mean over classes and the worst of them otherwise."""
        if len(class_names) == 2:
            named = {f"error on {name}": error for name, error in zip(class_names, self.by_class, strict=True)}
        else:
            worst = max(error for error in self.by_class if not math.isnan(error))
            named = {"mean over classes": self.balanced, "worst class": worst}
        return {"test error": self.test, **named}


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
    present = [error for error in by_class if not math.isnan(error)]
    return Errors(100 * wrong.mean().item(), sum(present) / len(present), by_class)
