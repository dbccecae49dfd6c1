"""Arguments of a wrong kind are named, with what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import metakern
from metakern.step.label_net import LabelNet
from metakern.testing import inputs

BATCH, META_BATCH = inputs.pair(8, 4, 5, classes=3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def correct(batch: Any) -> None:
    def logits(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(BATCH[0])

    net = LabelNet(3, 0).double()
    metakern.mlc_step(
        network(), net, batch, META_BATCH, label_optimizer=None, virtual_lr=0.1, logits_fn=logits
    )  # fmt: skip


CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a group that is none": (
        lambda: metakern.l2rw_step(network(), BATCH, META_BATCH, process_group="x"),
        *(TypeError, "process_group must be a torch.distributed.ProcessGroup or None, got str"),
    ),
    "a direction that is none": (
        lambda: metakern.reweight_step(network(), BATCH, META_BATCH, direction=3),
        *(TypeError, "direction must be a function of the meta gradient or None, got int"),
    ),
    "targets in int32": (
        lambda: metakern.l2rw_step(network(), (BATCH[0], BATCH[1].int()), META_BATCH),
        *(TypeError, r"batch: targets must be class indices in int64, got torch\.int32"),
    ),
    "no labels in a mapping": (
        lambda: correct({"x": BATCH[0]}),
        *(TypeError, r"batch must be .*'labels' for label_net to read; got a mapping with \['x'\]"),
    ),
    "no labels in a tuple": (lambda: correct((BATCH[0],)), TypeError, "batch must be .*'labels'.*; got tuple"),
    "no labels beside a tensor": (lambda: correct(BATCH[0]), TypeError, "batch must be .*'labels'.*; got Tensor"),
    "half an example": (
        lambda: metakern.check(network(), BATCH, META_BATCH, examples=2.5),
        *(ValueError, "examples must be at least 1 and whole, got 2.5"),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_named(name: str) -> None:
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call()
