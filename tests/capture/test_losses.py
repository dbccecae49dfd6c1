"""The default loss: the same value however the logits lie in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.capture.losses import cross_entropy
from metakern.testing.budget import assert_within
from metakern.testing.inputs import labels, normal


def test_token_logits_row_by_row_are_the_logits_transposed() -> None:
    logits = normal(3, 5, 7, dtype=torch.float64)
    targets = labels(3, 5, classes=7)
    targets[0, 2:] = -100
    targets[2] = -100
    side_by_side = logits.requires_grad_().transpose(1, 2)
    assert side_by_side.stride(1) == 1
    got = cross_entropy(side_by_side, targets)
    each = F.cross_entropy(side_by_side.contiguous(), targets, reduction="none")
    want = each.sum(1) / (targets != -100).sum(1).clamp(min=1)
    assert_within(got, want, 10.0)
    assert_within(*(torch.autograd.grad(losses.sum(), logits)[0] for losses in (got, want)), 1.0)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.ones(4, 1), torch.ones(4, 1), "one logit per example .* regression, several labels at once .* loss_fn"),
        (torch.ones(4, 1), torch.zeros(4, dtype=torch.long), "one logit per example"),
        (torch.ones(4, 1), torch.ones(4), r"need probabilities of shape \(4, 1\); for regression"),
        (torch.ones(4, 3), torch.tensor([[1.0, 1.0, 0.0]] * 4), "must be probabilities, .* loss_fn"),
        (torch.ones(4, 3), torch.tensor([[1.5, -0.5, 0.0]] * 4), "must be probabilities"),
        (torch.ones(4, 3), torch.tensor([0, 1, 2, 3]), "not among the 3 of the logits .* -100 leaves a position out"),
    ],
)
def test_targets_of_another_loss(logits: Tensor, targets: Tensor, message: str) -> None:
    """Some of them have a cross entropy, which is 0, or that of no distribution."""
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, targets)
