"""Arguments of a wrong kind are named, with what came and what was expected."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import metakern
from metakern.capture.refusal import EngineUnavailable
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


def correct_with(carry: Any, net: nn.Module | None = None) -> None:
    net = LabelNet(3, 0).double() if net is None else net
    metakern.mlc_step(network(), net, BATCH, META_BATCH, label_optimizer=None, virtual_lr=0.1, carry=carry)


def carry_of_wrong_shape() -> None:
    net = LabelNet(3, 0).double()
    correct_with({next(net.parameters()): torch.zeros(7)}, net)


def compile_weight_net(backend: Any) -> None:
    nets = network(), nn.Linear(1, 1).double()
    metakern.compile_mwnet_step(*nets, BATCH, META_BATCH, weight_optimizer=None, virtual_lr=0.1, backend=backend)


def compile_label_net(backend: Any) -> None:
    nets = network(), LabelNet(3, 0).double()
    metakern.compile_mlc_step(*nets, BATCH, META_BATCH, label_optimizer=None, virtual_lr=0.1, backend=backend)


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
    "a carry that is none": (lambda: correct_with(3), TypeError, "carry must be .* of a previous result, .*; got int"),
    "a carry by name": (lambda: correct_with({"out.weight": 0}), ValueError, "carry .* of its keys is 'out.weight'"),
    "a carry of another net": (
        lambda: correct_with({nn.Parameter(torch.zeros(2)): torch.zeros(2)}),
        *(ValueError, r"carry .* a parameter \(2,\) that label_net does not have"),
    ),
    "a carry of another shape": (carry_of_wrong_shape, ValueError, r"carry .* for a parameter \(.*\) it has \(7,\)"),
    "a backend that is none": (
        lambda: metakern.compile_step(network(), BATCH, META_BATCH, backend="foo"),
        *(ValueError, "backend must be the name of a backend of torch.compile, .*; got 'foo'"),
    ),
    "a number as a backend": (
        lambda: metakern.compile_step(network(), BATCH, META_BATCH, backend=3),  # pyright: ignore[reportArgumentType]
        *(TypeError, "backend must be the name of a backend of torch.compile, .*; got int"),
    ),
    "a backend of a weight net's step": (lambda: compile_weight_net("foo"), ValueError, "backend must be .*'foo'"),
    "a backend of a label net's step": (lambda: compile_label_net("foo"), ValueError, "backend must be .*'foo'"),
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


WIDER = torch.ones(len(META_BATCH[0]), 6).double(), META_BATCH[1]  # than the model's input
NOTED: dict[str, tuple[Callable[[], Any], str]] = {
    "reweight": (lambda: metakern.reweight_step(network(), BATCH, WIDER), "meta_batch"),
    "reweight, train": (lambda: metakern.reweight_step(network(), WIDER, META_BATCH), "batch"),
    "forward mode": (lambda: metakern.l2rw_step(network(), BATCH, WIDER, engine="jvp"), "meta_batch"),
    "in parts": (lambda: metakern.l2rw_step(network(), BATCH, WIDER, micro_batch=2), "meta_batch"),
    "dots": (lambda: metakern.grad_dots(network(), WIDER, META_BATCH), "batch"),
    "weight net": (
        lambda: metakern.mwnet_step(
            network(), nn.Linear(1, 1).double(), BATCH, WIDER, weight_optimizer=None, virtual_lr=0.1
        ),
        "meta_batch",
    ),
    "label net": (
        lambda: metakern.mlc_step(network(), LabelNet(3, 0), WIDER, BATCH, label_optimizer=None, virtual_lr=0.1),
        "batch",
    ),
    "balance": (lambda: metakern.metabalance_step(network(), BATCH, WIDER, inner_lr=0.1), "outer_batch"),
    "tangents": (lambda: metakern.logit_tangents(network(), BATCH, WIDER), "meta_batch"),
    "compiled": (lambda: metakern.compile_step(network(), BATCH, WIDER, backend="eager"), "meta_batch"),
}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since Python 3.11")
@pytest.mark.parametrize("name", NOTED)
def test_a_failing_pass_is_named(name: str) -> None:
    """The model's own error comes through, with a note of the batch."""
    call, argument = NOTED[name]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        call()
    assert notes_of(caught.value) == [f"(raised while metakern computed the losses of {argument})"]


def notes_of(error: BaseException | None) -> list[str]:
    return getattr(error, "__notes__", [])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since Python 3.11")
def test_a_failing_loss_is_named() -> None:
    def fail(model: nn.Module, batch: Any) -> torch.Tensor:
        raise KeyError("weight")

    with pytest.raises(KeyError, match="weight") as caught:
        metakern.l2rw_step(network(), BATCH, META_BATCH, loss_fn=fail)
    assert notes_of(caught.value) == ["(raised while metakern computed the losses of batch)"]
    with pytest.raises(RuntimeError, match="float64") as failed:
        metakern.check(network(), BATCH, WIDER)
    assert notes_of(failed.value.__cause__) == ["(raised while metakern computed the losses of meta_batch)"]


def test_messages_that_name_the_batch_need_no_note() -> None:
    with pytest.raises(TypeError, match=r"^meta_batch: targets must be") as caught:
        metakern.l2rw_step(network(), BATCH, (META_BATCH[0], META_BATCH[1].int()))
    assert not notes_of(caught.value)


def test_what_an_engine_cannot_do_needs_no_note() -> None:
    class Unsupported(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise EngineUnavailable("this engine cannot")

    model = nn.Sequential(network(), Unsupported())
    with pytest.raises(NotImplementedError, match="this engine cannot") as caught:
        metakern.l2rw_step(model, BATCH, META_BATCH)
    assert not notes_of(caught.value)
