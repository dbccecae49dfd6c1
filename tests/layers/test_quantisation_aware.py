"""Quantisation-aware training: rounding whose gradient is that of the identity, with steps that observers follow."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import (
    DeQuantStub,
    FakeQuantize,
    MovingAverageMinMaxObserver,
    QConfig,
    QuantStub,
    default_weight_fake_quant,
    disable_observer,
    get_default_qat_qconfig,
    prepare_qat,
)

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min:UserWarning")
IN_PARTS = QConfig(
    activation=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255),
    weight=default_weight_fake_quant,
)


def quantised(config: QConfig, observed: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(QuantStub(), nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), DeQuantStub()).train()
    model.qconfig = config
    model = prepare_qat(model)
    model(inputs.normal(40, 5, seed=2, dtype=torch.float32))
    return model if observed else model.apply(disable_observer)


@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward"])
@pytest.mark.parametrize("observed", [True, False])
def test_in_float64(engine: str, observed: bool) -> None:
    """Steps that observers follow are constants to the gradient; without observers examples are apart."""
    setup = Setup(quantised(IN_PARTS, observed).double(), *inputs.pair(6, 3, 5, classes=3), interacting=observed)
    found = judge_step(metakern.l2rw_step, setup, engine=engine).result.engine
    assert found == (engine if engine != "auto" else "jvp" if observed else "ghost")


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_fused_with_its_observer(backend: str) -> None:
    """One operator observes and rounds, and takes float32 only; its buffers move once in a step, by the train batch."""
    model = quantised(get_default_qat_qconfig(backend), observed=True)
    batch, meta_batch = inputs.pair(6, 3, 5, classes=3, dtype=torch.float32)
    plain = copy.deepcopy(model)
    truth = Setup(plain, batch, meta_batch, interacting=True).oracle(dtype=torch.float32)
    result = metakern.l2rw_step(model, batch, meta_batch)
    assert result.engine == "jvp"
    budget.assert_within(result.dots, truth.dots, truth.example_norms * truth.meta_norm, terms=1000)
    plain(batch[0])
    for (name, moved), once in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(moved, once), name
