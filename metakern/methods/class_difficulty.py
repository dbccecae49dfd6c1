"""CDB: weights by how badly the model performs on each class of a clean set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.methods.class_weights import by_class
from metakern.methods.method import Batch, Method, Outcome, Setting, Step, always
from metakern.methods.plain_training import predict
from metakern.methods.weighted_step import step_on

TAU_RULES = ("imagenet", "cifar")


def dynamic_tau(accuracies: Tensor, rule: str = "imagenet") -> Tensor:
    """The exponent tau from the spread of the difficulties d = 1 - accuracy; accuracies[C] in 0..1 -> [].

    bias = (1 - min d) / (1 - max d + 0.01); "imagenet": 2 sigmoid(bias - 1), as in the paper; "cifar": sigmoid(bias).
    The two published codes differ.
    Raises: ValueError for another rule.
    Source: Sinha et al., "Class-Wise Difficulty-Balanced Loss for Solving Class-Imbalance", ACCV 2020, section 3.3.
    """
    if rule not in TAU_RULES:
        raise ValueError(f"dynamic_tau: rule must be one of {', '.join(TAU_RULES)}, got {rule!r}")
    bias = accuracies.max() / (accuracies.min() + 0.01)
    return 2 * torch.sigmoid(bias - 1) if rule == "imagenet" else torch.sigmoid(bias)


def difficulty_weights(accuracies: Tensor, tau: float | Tensor) -> Tensor:
    """w_c = (1 - accuracy_c)^tau, scaled to mean 1; all 1 if no class has an error; accuracies[C] -> [C].

    Source: as `dynamic_tau`, equation 3.
    """
    weights = (1 - accuracies) ** tau
    total = weights.sum()
    return weights * len(weights) / total if total > 0 else torch.ones_like(weights)


@dataclass(frozen=True)
class DifficultySettings:
    """tau: the exponent; 0 derives it from the spread of difficulties. The paper also tries 0.5 to 2."""

    tau: float = 0.0

    def __post_init__(self) -> None:
        if not self.tau >= 0:
            raise ValueError(f"tau must be 0 or more, got {self.tau}")


def difficulty_step(rule: str = "imagenet", tau: float = 0.0) -> Step:
    """A step with weights by class difficulty and the exponent `tau`; if `tau` is 0, the exponent that `rule` gives.

    Difficulty is measured on the meta batch before each step, in evaluation mode; the paper measures it once per epoch,
    on 25 examples of each class. A class that the meta batch does not contain counts as perfectly classified.
    """

    def step(
        model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        (inputs, targets), (meta_inputs, meta_targets) = batch, meta_batch
        meta_logits = predict(model, meta_inputs)
        classes = len(setting.class_counts)
        right = (meta_logits.argmax(1) == meta_targets).to(meta_logits)
        held = torch.bincount(meta_targets, minlength=classes)
        accuracies = torch.where(held > 0, right.new_zeros(classes).index_add_(0, meta_targets, right) / held, 1)
        losses = F.cross_entropy(model(inputs), targets, reduction="none")
        # No class of the batch is difficult: all weights would be 0, and the plain mean is what is left to learn from.
        class_weights = difficulty_weights(accuracies, tau or dynamic_tau(accuracies, rule))
        usable = class_weights if class_weights[targets].any() else torch.ones_like(class_weights)
        return step_on(losses, optimizer, by_class(usable, targets), F.cross_entropy(meta_logits, meta_targets))

    return step


def _method(name: str, about: str, rule: str) -> Callable[[DifficultySettings], Method]:
    def with_settings(settings: DifficultySettings) -> Method:
        step = difficulty_step(rule, settings.tau)
        source = "Sinha et al., ACCV 2020"
        return Method(name, about, source, always(step), needs_meta=True, settings=settings, rebuilt=with_settings)

    return with_settings


CDB = _method("cdb", "weights by the error on each class of a clean set", "imagenet")(DifficultySettings())
CDB_CIFAR = _method("cdb-cifar", "cdb with the exponent of its code for CIFAR, sigmoid(bias)", "cifar")(
    DifficultySettings()
)
