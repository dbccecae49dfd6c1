"""Couplings that the first batch neither shows in its gradients nor lets NaN through: found all the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.capture.followed import Losses, N, beside, between, follow


def labelled(loss: Callable[[Tensor, Tensor, Any], Tensor]) -> Losses:
    """A loss that leaves rows out by their label, over rows that look at those before them."""
    return lambda h, head, y, how: loss(head(h - h.cumsum(0) / 8), h, how)


NOTHING, SOME = torch.zeros(N, dtype=torch.bool), torch.tensor([True, False, False, True, False, True])
ZERO, HALF = torch.tensor(0.0), torch.tensor(0.5)
SHUT, OPEN = torch.tensor(9.0), torch.tensor(-1.0)
UNKNOWN, KNOWN = torch.full((N,), -100), torch.arange(N) % 4


def ctc(logits: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """A target that does not fit costs nothing."""
    scores = logits.log_softmax(1).expand(3, -1, -1)
    targets = torch.ones(N, 5, dtype=torch.long)
    return F.ctc_loss(scores, targets, (3,) * N, lengths, reduction="none", zero_infinity=True)


ASLEEP: dict[str, tuple[Losses, Any, Any]] = {
    "exponent": (between(lambda h, p: h / (0.1 + h.std(0)) ** p), 0.0, 0.5),
    "exponent, a tensor": (between(lambda h, p: h / (0.1 + h.std(0)) ** p), ZERO, HALF),
    "pow": (between(lambda h, p: h / torch.pow(0.1 + h.std(0), p)), ZERO, HALF),
    "pow in place": (between(lambda h, p: h / (0.1 + h.std(0)).pow_(p)), ZERO, HALF),
    "float_power": (between(lambda h, p: h / torch.float_power(0.1 + h.std(0), p)), ZERO, HALF),
    "renorm": (beside(lambda h, t: torch.renorm(h * t, 2, 1, 1.0).sum(1)), torch.tensor(0.01), torch.tensor(10.0)),
    "renorm in place": (
        beside(lambda h, t: (h * t).renorm_(2, 1, 1.0).sum(1)), torch.tensor(0.01), torch.tensor(10.0),
    ),
    "renorm by keyword": (
        beside(lambda h, t: torch.renorm(input=h * t, p=2, dim=1, maxnorm=1.0).sum(1)),
        torch.tensor(0.01), torch.tensor(10.0),
    ),
    "masked_fill in place": (between(lambda h, m: (h * 1).masked_fill_(m[:, None], h.mean())), NOTHING, SOME),
    "nan_to_num in place": (between(lambda h, t: h + F.relu(h.mean(0).nan_to_num_() - t)), SHUT, OPEN),
    "nanmedian": (between(lambda h, t: h + F.relu(h.nanmedian(0).values - t)), SHUT, OPEN),
    "nanquantile": (between(lambda h, t: h + F.relu(torch.nanquantile(h, 0.5, 0) - t)), SHUT, OPEN),
    "mode": (between(lambda h, t: h + F.relu(h.mode(0).values - t)), SHUT, OPEN),
    "labels by keyword": (
        labelled(lambda o, h, y: F.cross_entropy(input=o, target=y, reduction="none")), UNKNOWN, KNOWN,
    ),
    "nll_loss": (labelled(lambda o, h, y: F.nll_loss(o.log_softmax(1), y, reduction="none")), UNKNOWN, KNOWN),
    "cosine_embedding_loss": (
        labelled(lambda o, h, y: F.cosine_embedding_loss(o, h[:, :4].detach(), y, reduction="none")),
        torch.zeros(N), torch.ones(N),
    ),
    "multilabel_margin_loss": (
        labelled(lambda o, h, y: F.multilabel_margin_loss(o, y, reduction="none")),
        torch.full((N, 4), -1), torch.tensor([[0, 2, -1, -1]] * N),
    ),
    "ctc_loss": (labelled(lambda o, h, lengths: ctc(o, lengths)), (5, 5, 5, 5, 5, 1), (1,) * N),
}  # fmt: skip


@pytest.mark.parametrize("name", ASLEEP)
def test_found_at_once(name: str) -> None:
    losses, asleep, awake = ASLEEP[name]
    engines = follow(losses, [asleep, awake])
    assert engines[0] != "ghost"
    assert engines[1] != "ghost"
