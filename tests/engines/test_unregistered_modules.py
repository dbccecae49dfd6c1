"""Modules that a model holds without registering them: a frozen teacher in a list, a normalisation in a dict."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs


class Holding(nn.Module):
    """A batch normalisation without parameters, held by `place`."""

    def __init__(self, place: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        norm = nn.BatchNorm1d(6, affine=False)
        self.listed, self.named = [nn.Sequential(norm)], {"norms": (norm,)}
        self.__dict__["hidden"] = norm
        reads: dict[str, Callable[[], nn.Module]] = {
            "list": lambda: self.listed[0],
            "dict": lambda: self.named["norms"][0],
            "attribute": lambda: self.hidden,
            "closure": lambda: norm,
        }
        self.read = reads[place]
        if place == "closure":
            del self.listed, self.named, self.hidden
        self.double()
        norm.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.read()(self.first(x)))

    def statistics(self) -> list[Tensor]:
        return [buffer.double() for buffer in self.read().buffers()]


BATCH, META = inputs.pair(5, 3, 4, classes=3)
PLACES = pytest.mark.parametrize("place", ["list", "dict", "attribute"])


@PLACES
@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward"])
def test_statistics_are_those_of_a_plain_step(place: str, engine: str) -> None:
    model, plain = Holding(place), Holding(place)
    metakern.l2rw_step(model, BATCH, META, engine=engine)
    plain(BATCH[0])
    for found, want in zip(model.statistics(), plain.statistics(), strict=True):
        budget.assert_within(found, want, 1.0 + want.abs())


@PLACES
def test_dots_alone_and_refused_steps_change_nothing(place: str) -> None:
    model = Holding(place)
    before = [buffer.clone() for buffer in model.statistics()]
    metakern.grad_dots(model, BATCH, META)
    with pytest.raises(NotImplementedError, match="examples interact"):
        metakern.l2rw_step(model, BATCH, META, engine="ghost")
    with pytest.raises(NotImplementedError, match="examples interact"):
        metakern.l2rw_step(model, BATCH, META, micro_batch=3)
    assert all(map(torch.equal, before, model.statistics()))


@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward"])
def test_outside_of_the_model_either_batch_counts_once(engine: str) -> None:
    model, plain = Holding("closure"), Holding("closure")
    metakern.l2rw_step(model, BATCH, META, engine=engine)
    for inputs_of, _ in (BATCH, META):
        plain(inputs_of)
    for found, want in zip(model.statistics(), plain.statistics(), strict=True):
        budget.assert_within(found, want, 1.0 + want.abs())
