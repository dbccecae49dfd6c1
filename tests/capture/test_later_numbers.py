"""The same operations at the same sizes, harmless at first; then a number or the order of a list couples examples."""

from collections import deque
from enum import IntEnum
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.capture.independence import examples
from tests.capture.followed import IN_ORDER, MIXED, WIDTH, Losses, N, beside, between, follow


class Dim(IntEnum):
    ROWS = 0
    FEATURES = 1


def rolled(h: Tensor, start: Any) -> Tensor:
    return torch.cat([h[start:], h[:start]])


def rows_of_a_list(h: Tensor, order: list[int]) -> Tensor:
    rows = [h[k] for k in range(N)]
    return torch.stack([rows[k] for k in order])


def rows_taken_twice(h: Tensor, order: list[int]) -> Tensor:
    rows = [h[k] for k in range(N)]
    return torch.stack(rows) * torch.stack([rows[k] for k in order])


def view_written(h: Tensor, start: int) -> Tensor:
    whole = torch.zeros_like(h)
    whole.narrow(0, start, 3).copy_(h[:3])
    return whole + h


def slices_written(h: Tensor, start: Tensor) -> Tensor:
    whole = torch.zeros_like(h)
    whole[start:] = h[: N - int(start)]
    return whole + h


def spans(h: Tensor, head: nn.Module, y: Tensor, ends: Tensor) -> Tensor:
    logits = head(h)
    parts = [slice(start, end) for start, end in pairwise(ends)]
    return torch.stack([F.cross_entropy(logits[part], y[part], reduction="none").mean() for part in parts])


def sorted_losses(h: Tensor, head: nn.Module, y: Tensor, keys: list[int]) -> Tensor:
    logits = head(h)
    found = [F.cross_entropy(logits[k : k + 1], y[k : k + 1], reduction="none")[0] for k in range(N)]
    return torch.stack([loss for _, loss in sorted(zip(keys, found), key=lambda pair: pair[0])])


def reduced(function: Any) -> Losses:
    return lambda h, head, y, how: function(head(h), y, how).expand(N)


NUMBERS: dict[str, tuple[Losses, Any, Any]] = {
    "slice by a tensor": (between(rolled), torch.tensor(0), torch.tensor(2)),
    "slice written by a tensor": (between(slices_written), torch.tensor(0), torch.tensor(2)),
    "spans by a tensor": (spans, torch.tensor([0, 2, 4, 6]), torch.tensor([0, 1, 4, 6])),
    "list of rows": (between(rows_of_a_list), IN_ORDER, MIXED),
    "list of rows, twice": (between(rows_taken_twice), IN_ORDER, MIXED),
    "sorted losses": (sorted_losses, IN_ORDER, MIXED),
    "view written": (between(view_written), 0, 3),
    "deque": (between(lambda h, order: h[deque(order)]), IN_ORDER, MIXED),
    "enum": (between(lambda h, dim: 3 * h.softmax(dim)), Dim.FEATURES, Dim.ROWS),
    "dimension of vmap": (
        between(lambda h, dim: 3 * torch.vmap(lambda c: c.softmax(0), in_dims=dim, out_dims=dim)(h)), 0, 1,
    ),
    "cross entropy": (reduced(lambda o, y, how: F.cross_entropy(o, y, reduction=how)), "none", "mean"),
    "squared error": (reduced(lambda o, y, how: F.mse_loss(o[:, 0], y.double(), reduction=how)), "none", "mean"),
    "order of a norm": (between(lambda h, p: h / (1 + torch.norm(h, p, 0))), 0.0, 2.0),
    "view as": (
        beside(lambda h, like: (h.view_as(like).softmax(-1).view(N, WIDTH) ** 2).sum(1)),
        torch.zeros(N, WIDTH), torch.zeros(N // 2, 2 * WIDTH),
    ),
    "view as, sizes lost": (
        beside(lambda h, like: h.view_as(like).amax(0).amax(-1)),
        torch.zeros(1, N, WIDTH), torch.zeros(2, N, WIDTH // 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_move_rows(name: str) -> None:
    losses, apart, mixed = NUMBERS[name]
    engines = follow(losses, [apart, mixed, apart, mixed])
    assert engines == ["ghost", "jvp", "ghost", "jvp"]


WOKEN: dict[str, tuple[Losses, list[Any], Any]] = {
    "number": (
        beside(lambda h, how: F.relu(how[1] - (h - rolled(h, how[0])).square().sum(1)) * (how[0] > 0)),
        [(0, torch.tensor(0.5)), (1, torch.tensor(0.0))], (1, torch.tensor(50.0)),
    ),
    "sizes": (
        beside(lambda h, how: F.relu(how[1] - (h.view(-1, how[0], WIDTH) - h.view(-1, how[0], WIDTH).mean(1, True))
                                     .square().sum(-1)).view(N)),
        [(1, torch.tensor(0.5)), (2, torch.tensor(-1.0))], (2, torch.tensor(50.0)),
    ),
    "labels": (
        lambda h, head, y, how: F.cross_entropy(head(rows_of_a_list(h, how[0])), how[1], reduction="none"),
        [(IN_ORDER, torch.arange(N) % 4), (MIXED, torch.full((N,), -100))], (MIXED, torch.arange(N) % 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WOKEN)
def test_other_numbers_behind_a_hinge_that_is_shut(name: str) -> None:
    """Nothing of the coupling shows in the gradients of the batch that brings the numbers."""
    losses, harmless, awake = WOKEN[name]
    assert follow(losses, [*harmless, awake]) == ["ghost", "jvp", "jvp"]


def test_with_many_numbers_those_that_come_again_are_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are checked where they are met, so each step is exact; what sleeps is looked for when they come again."""
    monkeypatch.setattr(examples, "_AT_ONCE", 0)
    losses, harmless, awake = WOKEN["number"]
    assert follow(losses, [*harmless, awake]) == ["ghost", "ghost", "jvp"]
    assert follow(losses, [*harmless, harmless[1], awake]) == ["ghost", "ghost", "jvp", "jvp"]


@pytest.mark.parametrize("number", ["scale", "bound", "exponent", "rate", "share"])
def test_numbers_that_move_no_rows_cost_nothing(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be others in every step."""
    values = {
        "scale": lambda h, k: torch.add(h, h.detach(), alpha=k) * k,
        "bound": lambda h, k: h.clamp(-k, k),
        "exponent": lambda h, k: (1 + h) ** (k + 0.5),
        "rate": lambda h, k: F.dropout(h, k / 10, training=False) + F.elu(h, alpha=float(k)),
        "share": lambda h, k: torch.lerp(h, h.square(), k / 10),
    }
    monkeypatch.setattr(examples, "require_order", None)
    assert follow(between(values[number]), range(1, 5)) == ["ghost"] * 4


def test_known_numbers_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, order = NUMBERS["list of rows"][0], IN_ORDER
    calls = []
    for check in ("require_order", "_require_no_forward_path"):
        monkeypatch.setattr(examples, check, lambda *_, check=check: calls.append(check))
    assert follow(losses, [order] * 4) == ["ghost"] * 4
    assert calls == ["_require_no_forward_path"]
