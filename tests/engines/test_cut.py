"""What a batch holds beside tensors is split with them."""

from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.engines.cut import cut, examples_of, spread
from metakern.testing import budget, inputs

N = 12


class Held:
    """An object of the user's own."""

    def __init__(self, costs: Tensor) -> None:
        self.costs = costs


COSTS: dict[str, Callable[[list[float]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "in a mapping": lambda costs: UserDict(costs=UserDict(costs=torch.tensor(costs))),
    "dicts": lambda costs: [{"cost": cost, "name": "it"} for cost in costs],
}


def costs_in(held: Any) -> list[Any]:
    if isinstance(held, UserDict):
        return costs_in(held["costs"])
    return [one["cost"] if isinstance(one, dict) else one for one in held]


def losses(model: nn.Module, batch: tuple[Tensor, Tensor, Any]) -> Tensor:
    each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return torch.stack([loss * cost for loss, cost in zip(each, costs_in(batch[2]))])


@pytest.mark.parametrize("kind", COSTS)
def test_a_number_for_each_example(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    (x, y), meta = inputs.pair(N, 4, 4, classes=3)
    batch, meta_batch = (x, y, COSTS[kind]([1.0] * 7 + [5.0] * 5)), (*meta, COSTS[kind]([1.0] * 4))
    whole = metakern.grad_dots(model, batch, meta_batch, loss_fn=losses)
    parts = metakern.grad_dots(model, batch, meta_batch, loss_fn=losses, micro_batch=4)
    budget.assert_within(parts.losses, whole.losses, whole.losses.abs(), dtype=torch.float64)
    budget.assert_within(parts.dots, whole.dots, 1 + whole.dots.abs(), dtype=torch.float64)


def test_what_is_not_split() -> None:
    """Other lengths, and words; a mapping keeps its class if its attributes are its entries."""
    batch = {"x": torch.arange(N), "classes": ["a", "b"], "text": "x" * N, "encoded": UserDict(ids=torch.arange(N))}
    first, last = cut(batch, 8, "batch")
    assert first["classes"] == last["classes"] == ["a", "b"]
    assert first["text"] == "x" * N
    assert type(last["encoded"]) is UserDict
    assert last["encoded"]["ids"].tolist() == last["x"].tolist() == [8, 9, 10, 11]
    assert batch["encoded"]["ids"].tolist() == list(range(N))


def test_an_object_with_rows_inside_is_an_error() -> None:
    with pytest.raises(TypeError, match="batch holds an object of type Held with a tensor of 12 rows inside"):
        examples_of((torch.ones(N, 3), Held(torch.ones(N))), "batch")
    assert examples_of((torch.ones(N, 3), Held(torch.ones(5))), "batch") == N


@pytest.mark.parametrize("count", [1, 4, 5, 8, N, 100])
@pytest.mark.parametrize("phase", [0.0, 0.5, 0.999])
def test_examples_from_every_stretch(count: int, phase: float) -> None:
    rows = spread(torch.arange(N), count, "batch", phase).tolist()
    assert len(set(rows)) == len(rows) == min(count, N)
    assert [int(row * len(rows) / N) for row in rows] == sorted(int(row * len(rows) / N) for row in rows)
    assert rows[0] < N / len(rows) <= N - rows[-1] + N / len(rows)
