"""Losses that take things out of their batch, or put some in: every pass finds the batch as it was given."""

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step


def popped(model: nn.Module, batch: Any) -> Tensor:
    targets = batch.pop("labels")
    return F.cross_entropy(model(batch["x"]), targets, reduction="none")


def replaced(model: nn.Module, batch: Any) -> Tensor:
    batch["x"] = 2 * batch["x"]
    return F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def popped_from_a_list(model: nn.Module, batch: Any) -> Tensor:
    targets = batch.pop()
    return F.cross_entropy(model(batch[0]), targets, reduction="none")


def popped_inside(model: nn.Module, batch: Any) -> Tensor:
    given, targets = batch
    return F.cross_entropy(model(given.pop("x")), targets, reduction="none")


FORMS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Any]]] = {
    "popped": (popped, lambda x, y: {"x": x, "labels": y}),
    "popped-of-transformers": (popped, lambda x, y: UserDict({"x": x, "labels": y})),
    "replaced": (replaced, lambda x, y: {"x": x, "labels": y}),
    "list": (popped_from_a_list, lambda x, y: [x, y]),
    "inside": (popped_inside, lambda x, y: ({"x": x}, y)),
}


@pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
@pytest.mark.parametrize("form", FORMS)
def test_exact(form: str, engine: str) -> None:
    loss_fn, build = FORMS[form]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)

    def plain(model: nn.Module, batch: Any) -> Tensor:
        return loss_fn(model, build(*batch))

    truth = Setup(model, batch, meta_batch, loss_fn=plain).oracle()
    given = build(*batch), build(*meta_batch)
    judge_step(metakern.l2rw_step, Setup(model, *given, loss_fn=loss_fn), truth=truth, engine=engine)
    assert len(given[0]) == 2


def test_a_loss_may_ask_which_batch_it_is_given() -> None:
    batch, meta_batch = ({"x": x, "labels": y} for x, y in inputs.pair(5, 3, 4, classes=3))
    given = []

    def losses(model: nn.Module, at: Any) -> Tensor:
        given.append(at is batch or at is meta_batch)
        return F.cross_entropy(model(at["x"]), at["labels"], reduction="none")

    metakern.l2rw_step(nn.Linear(4, 3).double(), batch, meta_batch, loss_fn=losses)
    assert all(given)
