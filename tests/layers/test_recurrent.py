"""Recurrent layers as cuDNN computes them: without a second derivative, and with dropout masks of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import metakern
from metakern.capture.repeatable import RECURRENT, require_repeatable
from metakern.layers.forms import twice_differentiable
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

LAYERS = (nn.LSTM, nn.GRU, nn.RNN)


def setup(layer: type[nn.RNNBase], device: str, dropout: float = 0.0) -> Setup:
    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0])[0][:, -1], batch[1], reduction="none")

    torch.manual_seed(0)
    model = layer(4, 3, num_layers=2, dropout=dropout, batch_first=True).double().to(device)
    batch, meta_batch = ((x.to(device), y.to(device)) for x, y in inputs.pair(6, 3, 5, 4, classes=3))
    return Setup(model, batch, meta_batch, losses)


class Calls(torch.overrides.TorchFunctionMode):
    """Whole recurrent layers that were run: name, arguments, and whether cuDNN was allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[tuple[str, Any, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RECURRENT:
            self.met.append((func.__name__, args, torch.backends.cudnn.enabled))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", LAYERS)
def test_are_differentiated_twice_without_cudnn(layer: type[nn.RNNBase]) -> None:
    model, x = layer(4, 3), torch.ones(5, 2, 4)
    with Calls() as calls:  # beneath, so that it meets what the other hands on
        model(x)
        with twice_differentiable():
            model(x)
    assert [allowed for *_, allowed in calls.met] == [True, False]
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("layer", LAYERS)
def test_masks_that_cannot_be_drawn_again_are_refused(layer: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(5, 2, 4)
    packed = nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 0]])
    with Calls() as calls:
        for model in (layer(4, 3, 2), layer(4, 3, 2, dropout=0.5).eval(), layer(4, 3, 2, dropout=0.5)):
            model(x)
            model(packed)
    there = FakeTensor(FakeTensorMode(), torch.empty(3, device="meta"), torch.device("cuda:0"))

    def refused(data: Tensor) -> list[int]:
        found = []
        for place, (name, args, _) in enumerate(calls.met):
            try:
                require_repeatable(name, args, data, drew=False)
            except NotImplementedError:
                found.append(place)
        return found

    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda x: True)
    assert refused(x) == []
    assert refused(there) == [4, 5]
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda x: False)
    assert refused(there) == []


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS)
def test_by_cudnn_on_a_gpu(layer: type[nn.RNNBase]) -> None:
    for engine in ("ghost", "double_backward"):
        judge_step(metakern.l2rw_step, setup(layer, "cuda"), engine=engine)
    case = setup(layer, "cuda", dropout=0.5)
    with pytest.raises(NotImplementedError, match=r"a generator of its own.*cudnn.enabled = False"):
        metakern.l2rw_step(case.model, case.batch, case.meta_batch, loss_fn=case.loss_fn, engine="ghost")
