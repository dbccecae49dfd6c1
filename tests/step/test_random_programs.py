"""Random programs against autograd, by every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing.judge import judge_step
from tests.step.random_programs import program
from tests.step.test_metabalance import reference as balanced_reference
from tests.step.test_mlc import Reference as LabelNetReference
from tests.step.test_mlc import given_features, label_net
from tests.step.virtual_reference import WeightNet, assert_same, mwnet_reference, twin

BLOCK = 50
OTHERWISE = [{"engine": "jvp"}, {"engine": "double_backward"}, {"memory": "two_pass"}]


def judge(seed: int, **keywords: Any) -> str:
    """The engine that served, exactly."""
    setup, pieces = program(seed)
    try:
        return judge_step(metakern.l2rw_step, setup, **keywords).result.engine
    except Exception as error:
        raise AssertionError(f"program {seed} ({', '.join(pieces)}): {error}") from error


@pytest.mark.parametrize("block", range(8))
def test_random_programs(block: int) -> None:
    engines = [judge(seed) for seed in range(block * BLOCK, (block + 1) * BLOCK)]
    assert set(engines) == {"ghost", "jvp"}
    assert engines.count("ghost") > BLOCK / 2


@pytest.mark.parametrize("keywords", OTHERWISE, ids=str)
def test_random_programs_otherwise(keywords: dict[str, Any]) -> None:
    for seed in range(1000, 1000 + 2 * BLOCK):
        judge(seed, **keywords)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_weight_nets_of_random_programs(memory: str) -> None:
    """Against double backward through the whole virtual step."""
    for seed in range(2000, 2000 + BLOCK):
        setup, pieces = program(seed)
        if "checkpointed" in pieces:  # the reference calls the model with other parameters, which run again as they are
            continue
        torch.manual_seed(seed)
        model, net = nn.Sequential(setup.model, Mean()), WeightNet().double()
        reference, reference_net = twin(model), twin(net)
        given: dict[str, Any] = {
            "virtual_lr": 0.3,
            "normalise": ("sum", "detached_sum", "mean", "none")[seed % 4],
            "detach_losses": seed % 3 > 0,
        }
        batches = setup.batch, setup.meta_batch
        mwnet_reference(reference, reference_net, *batches, weight_optimizer=sgd(reference_net), **given)
        metakern.mwnet_step(model, net, *batches, weight_optimizer=sgd(net), memory=memory, **given)
        assert_same(net, reference_net, f"weight net of program {seed}")
        assert_same(model, reference, f"program {seed}")


@pytest.mark.parametrize("fused", [True, False])
def test_label_nets_of_random_programs(fused: bool) -> None:
    """Against double backward through the whole virtual step."""
    for seed in range(3000, 3000 + BLOCK // 2):
        setup, pieces = program(seed)
        if "checkpointed" in pieces:  # as above
            continue
        torch.manual_seed(seed)
        model, net = nn.Sequential(setup.model, Mean()), label_net(skip=seed % 2 > 0)
        theirs, their_net = twin(model), twin(net)
        batches = setup.batch, setup.meta_batch
        reference = LabelNetReference(theirs, their_net, "sgd", 0.3)
        reference.step(*batches, optimizer=sgd(theirs), label_optimizer=sgd(their_net), fused=fused)
        settings: dict[str, Any] = {"virtual_lr": 0.3, "features": given_features(len(batches[0][1])), "fused": fused}
        metakern.mlc_step(model, net, *batches, label_optimizer=sgd(net), optimizer=sgd(model), **settings)
        assert_same(net, their_net, f"label net of program {seed}")
        assert_same(model, theirs, f"program {seed}")


@pytest.mark.parametrize("order", [1, 2])
def test_balancing_random_programs(order: int) -> None:
    """Against double backward through the inner step."""
    for seed in range(4000, 4000 + BLOCK // 2):
        setup, pieces = program(seed)
        if "checkpointed" in pieces:  # as above
            continue
        model = nn.Sequential(setup.model, Mean())
        other, batches = twin(model), (setup.batch, setup.meta_batch)
        metakern.metabalance_step(model, *batches, inner_lr=0.3, order=order, leak=0.1)
        found, _ = balanced_reference(other, *batches, inner_lr=0.3, order=order, leak=0.1)
        for key, p in other.named_parameters():
            p.grad = found[key]
        assert_same(model, other, f"program {seed}")


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.5)
