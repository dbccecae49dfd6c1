"""Errors of a model on test examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metakern.data import Examples
from metakern.methods.plain_training import predict


class Errors(NamedTuple):
    """Errors in percent: over all examples, the mean over classes, and of each class; nan for a class without any.

    `area`: area under the ROC curve in percent; nan unless there are two classes and both have examples. `macro_f1`:
    the mean over classes of the harmonic mean of precision and recall, in percent.
    """

    test: float
    balanced: float
    by_class: list[float]
    area: float = math.nan
    macro_f1: float = math.nan

    def columns(self, class_names: Sequence[str]) -> dict[str, float]:
        """The columns of a table: with two classes each of them, else the mean over classes and the worst class."""
        if len(class_names) == 2:
            named = {f"error on {name}": error for name, error in zip(class_names, self.by_class, strict=True)}
            named |= {} if math.isnan(self.area) else {"area under ROC": self.area}
        else:
            worst = max(error for error in self.by_class if not math.isnan(error))
            named = {"mean over classes": self.balanced, "worst class": worst}
        return {"test error": self.test, **named}


def measure_errors(model: nn.Module, examples: Examples, classes: int) -> Errors:
    """Errors of the model's predictions (largest logit) on `examples`; the mode of the model is restored.

    Raises: as `predict`.
    """
    logits = predict(model, examples.inputs)
    predicted = logits.argmax(1)
    wrong = (predicted != examples.targets).double()
    by_class = [100 * wrong[examples.targets == target].mean().item() for target in range(classes)]
    present = [error for error in by_class if not math.isnan(error)]
    area = roc_area(logits[:, 1] - logits[:, 0], examples.targets == 1) if classes == 2 else math.nan
    f1 = 100 * macro_f1(predicted, examples.targets, classes)
    return Errors(100 * wrong.mean().item(), sum(present) / len(present), by_class, 100 * area, f1)


def macro_f1(predicted: Tensor, targets: Tensor, classes: int) -> float:
    """Mean over classes of 2 [right] / ([predicted] + [true]), [.] how many; predicted[n], targets[n] int64.

    Classes that are neither predicted nor true are left out, as by scikit-learn.
    """
    right = torch.bincount(targets[predicted == targets], minlength=classes)
    both = torch.bincount(predicted, minlength=classes) + torch.bincount(targets, minlength=classes)
    return float((2 * right.double() / both)[both > 0].mean())


def roc_area(scores: Tensor, positive: Tensor) -> float:
    """The share of pairs of a positive and a negative in which the positive has the higher score; ties count half.

    scores[n], positive[n] bool; nan if there is no such pair.
    """
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return math.nan
    _, place, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]  # from 1, the mean rank among equal scores
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
