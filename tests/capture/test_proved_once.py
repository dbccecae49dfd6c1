"""Independence is proved in the first step of a structure, and the verdict kept, also where nobody reads an output."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.capture.independence import examples
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step


class Recurrent(nn.Module):
    """Of its last state, three by three, sizes do not tell along which dimension the three examples are."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.reads_state = layer(4, 3, batch_first=True), False

    def forward(self, x: Tensor) -> Tensor:
        y, last = self.layer(x)
        return (last[0] if isinstance(last, tuple) else last)[-1] if self.reads_state else y.mean(1)


class Penalised(nn.Module):
    """Also makes a number that has no room for examples, of parameters and data, for whoever asks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.reads_state = nn.Linear(4, 4), nn.Linear(4, 3), False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        self.penalty = self.layer.weight.norm() + hidden.mean()
        return self.head(torch.tanh(hidden).mean(1))


MODELS = {
    **{layer.__name__: lambda layer=layer: Recurrent(layer) for layer in (nn.LSTM, nn.GRU, nn.RNN)},
    "a penalty": Penalised,
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_that_nobody_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    given = Setup(MODELS[name]().double(), *inputs.pair(3, 2, 5, 4, classes=3))
    metakern.l2rw_step(given.model, given.batch, given.meta_batch)
    proofs: list[Any] = []
    prove = examples._prove
    monkeypatch.setattr(examples, "_prove", lambda *args: proofs.append(args) or prove(*args))
    assert judge_step(metakern.l2rw_step, given).result.engine == "ghost"
    assert not proofs


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_read_later(layer: type[nn.RNNBase]) -> None:
    """Another output of the same call is another structure."""
    torch.manual_seed(0)
    given = Setup(Recurrent(layer).double(), *inputs.pair(3, 2, 5, 4, classes=3), loss_fn=losses)
    for given.model.reads_state in (False, True, False):
        assert judge_step(metakern.l2rw_step, given).result.engine == "ghost"


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
