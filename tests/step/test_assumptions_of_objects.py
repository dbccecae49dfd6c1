"""What a compiled step reads out of sight: constructors, backward passes, attributes, tensors, entries of batches."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import inputs


def batches(n: int = 8, m: int = 3) -> tuple[Any, Any]:
    return inputs.pair(n, m, 6, classes=3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def entropies(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Config:
    margin, alpha = 1.0, 1.0


class Margin:
    def __init__(self) -> None:
        self.factor = Config.margin

    def scaled(self, losses: Tensor) -> Tensor:
        return losses * self.factor


class Made:
    def __new__(cls) -> Made:
        made = super().__new__(cls)
        made.factor = Config.margin
        return made


class Reverse(torch.autograd.Function):
    """Gradient reversal, by a factor that is looked up in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -Config.alpha * grad


def made_in_the_loss(model: nn.Module, batch: Any) -> Tensor:
    return Margin().scaled(entropies(model, batch))


def made_by_new(model: nn.Module, batch: Any) -> Tensor:
    return entropies(model, batch) * Made().factor


def reversed_gradients(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model[2](Reverse.apply(model[:2](batch[0]))), batch[1], reduction="none")  # pyright: ignore


@pytest.mark.parametrize(
    ("losses", "name"), [(made_in_the_loss, "margin"), (made_by_new, "margin"), (reversed_gradients, "alpha")]
)
def test_numbers_of_constructors_and_backward_passes(
    losses: Callable[..., Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = metakern.compile_step(network(), *batches(), loss_fn=losses, backend="eager")
    step(*batches())
    monkeypatch.setattr(Config, name, 3.0)
    with pytest.raises(ValueError, match="make another step"):
        step(*batches())


class Items(dict):  # type: ignore[type-arg]
    pass


class Ordered(OrderedDict):  # type: ignore[type-arg]
    pass


class Listed(list):  # type: ignore[type-arg]
    pass


class Wrapped(UserDict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("kind", [Items, Ordered, Listed, Wrapped])
def test_attributes_of_collections(kind: type) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.settings = nn.Linear(6, 3).double(), kind()
            self.settings.temperature = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) / self.settings.temperature

    model = Net()
    step = metakern.compile_step(model, *batches(), backend="eager")
    step(*batches())
    model.settings.temperature = 4.0
    with pytest.raises(ValueError, match="make another step"):
        step(*batches())


MADE: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "tensor": lambda losses, batch: losses * torch.tensor([batch[0].abs().max(), 1.0])[0],
    "as_tensor": lambda losses, batch: losses * torch.as_tensor([batch[0].abs().max()]),
    "new_tensor": lambda losses, batch: losses * losses.new_tensor([batch[0].abs().max()]),
    "of integers": lambda losses, batch: losses * torch.tensor([batch[1].sum(), 2])[0],
    "legacy": lambda losses, batch: losses * torch.DoubleTensor([batch[0].abs().max(), 1.0])[0],
    "legacy, of integers": lambda losses, batch: losses * torch.LongTensor([(batch[1] == batch[1][0]).sum()]),
    "tensor_split": lambda losses, batch: torch.cat(torch.tensor_split(losses, torch.tensor([2]))),
}


@pytest.mark.parametrize("name", MADE)
def test_tensors_made_of_tensors_are_rejected(name: str) -> None:
    """torch reads their values out of sight of what traces it."""
    with pytest.raises(NotImplementedError, match="takes numbers out of tensors"):
        metakern.compile_step(
            *(network(), *batches()),
            loss_fn=lambda model, batch: MADE[name](entropies(model, batch), batch),
            backend="eager",
        )


def test_tensors_made_of_numbers() -> None:
    model, weights = network(), [1.0, 2.0, 3.0]

    def losses(model: nn.Module, batch: Any) -> Tensor:
        each = entropies(model, batch) * torch.tensor(weights, dtype=torch.float64)[batch[1]]
        return torch.cat(torch.tensor_split(each, 2))

    step = metakern.compile_step(model, *batches(), loss_fn=losses, backend="eager")
    assert torch.equal(step(*batches()).losses, metakern.l2rw_step(model, *batches(), loss_fn=losses).losses)


def with_more(more: Any) -> tuple[Any, Any]:
    return tuple((*batch, more) for batch in batches())  # pyright: ignore


def test_entries_of_a_batch_that_may_be_written_into() -> None:
    with pytest.raises(TypeError, match="a ndarray at position 2; captured and compiled steps take tensors"):
        metakern.compile_step(network(), *with_more(np.ones(1)), loss_fn=entropies, backend="eager")


def test_entries_of_a_batch_that_are_equal_but_not_the_same() -> None:
    step = metakern.compile_step(
        *(network(), *with_more(1)),
        loss_fn=lambda model, batch: entropies(model, batch) * (2.0 if batch[2] is True else 1.0),
        backend="eager",
    )
    with pytest.raises(ValueError, match="1 was captured at position 2, got True"):
        step(*with_more(True))
