"""The counter of memory sees what a step takes when nobody watches."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import count

SIDE = 256

ROW, ROWS = torch.ones(1, SIDE), torch.arange(2)

SUMS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "added in place": (2, lambda w: (w * ROW).sum() + (w * ROW).sum() + (w * ROW).sum()),
    "a view is not added to": (3, lambda w: F.linear(F.linear(ROW, w), w).sum()),
    "of a linear layer and a table": (3, lambda w: F.linear(F.embedding(ROWS, w), w).sum()),
    "of two tables": (2, lambda w: (F.embedding(ROWS, w) + F.embedding(ROWS, w)).sum()),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_gradients(name: str) -> None:
    """Autograd adds to a gradient that nobody else holds, unless it is a view; watched, it makes a third."""
    gradients, loss = SUMS[name]
    weight = nn.Parameter(torch.ones(SIDE, SIDE))

    def step() -> None:
        weight.grad = None
        loss(weight).backward()

    _, _, peak = count(step, "cpu")
    assert gradients <= peak / (SIDE * SIDE * 4) < gradients + 0.1
