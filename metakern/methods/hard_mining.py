"""Hard mining: all examples of a large batch outside its largest class, and the hardest of that class.

With two classes these are equally many; with more, the largest class has as many as the others on average.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.methods.method import Batch, Method, Outcome, Setting, Step, always
from metakern.methods.plain_training import predict


def hardest(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """Rows[k'] to train on: all examples that are not of the most frequent class, and the k hardest of that class.

    k is the mean count of the other classes in the batch, but at least 1.
    Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, section 4.1.
    """
    majority, others, k = _division(targets, setting)
    order = losses[majority].argsort(descending=True, stable=True)
    return torch.cat([others, majority[order[:k]]])


def first(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """As `hardest`, but with the first k examples of the majority class.

    The paper's code ranks by the mean loss of the batch, so that all majority examples are equal: random
    under-sampling.
    """
    majority, others, k = _division(targets, setting)
    return torch.cat([others, majority[:k]])


def _division(targets: Tensor, setting: Setting) -> tuple[Tensor, Tensor, int]:
    in_majority = targets == int(setting.class_counts.argmax())
    majority, others = in_majority.nonzero().squeeze(1), (~in_majority).nonzero().squeeze(1)
    return majority, others, max(1, round(len(others) / (len(setting.class_counts) - 1)))


def mining_step(select: Callable[[Tensor, Tensor, Setting], Tensor]) -> Step:
    """Losses of all examples in evaluation mode, then a plain step on the rows that `select` returns."""

    def step(
        model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        inputs, targets = batch
        losses = F.cross_entropy(predict(model, inputs), targets, reduction="none")
        rows = select(losses, targets, setting)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        return Outcome(torch.zeros_like(losses).index_fill_(0, rows, 1 / len(rows)), losses, None)

    return step


_SOURCE = "the baseline of Ren et al., ICML 2018"

HARD_MINING = Method(
    "hard-mining",
    "all minority examples of a batch, and as many of the hardest majority examples as a minority class has",
    _SOURCE,
    always(mining_step(hardest)),
    batch_size=500,
)
HARD_MINING_AS_SHIPPED = Method(
    "hard-mining-as-shipped",
    "as in the paper's code: the majority examples are the first, not the hardest",
    _SOURCE,
    always(mining_step(first)),
    batch_size=500,
)
