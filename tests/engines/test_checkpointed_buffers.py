"""Checkpointed layers run again in a backward pass, and then write their buffers again: as often as in a plain step."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metakern
from metakern.step import LabelNet
from metakern.testing import budget, inputs


class Checkpointed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv1d(2, 4, 1), norm, nn.Linear(12, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return torch.tanh(self.norm(self.first(x)))

        return self.second(checkpoint(block, x, use_reentrant=False).flatten(1))  # type: ignore[union-attr]


NORMS = {"batch": nn.BatchNorm1d(4), "instance": nn.InstanceNorm1d(4, affine=True, track_running_stats=True)}
CASES = [("batch", "jvp"), ("batch", "double_backward"), ("instance", "ghost"), ("instance", "jvp")]


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize(("norm", "engine"), CASES)
def test_running_statistics_are_those_of_plain_steps(norm: str, engine: str, memory: str) -> None:
    model, (batch, meta_batch) = Checkpointed(NORMS[norm]), inputs.pair(5, 3, 2, 3, classes=3)
    plain = copy.deepcopy(model)
    for _ in range(2):
        metakern.l2rw_step(model, batch, meta_batch, engine=engine, memory=memory)
        F.cross_entropy(plain(batch[0]), batch[1]).backward()
    require_same_buffers(model, plain)


@pytest.mark.parametrize(("norm", "engine"), CASES)
def test_so_they_are_after_steps_of_a_weight_net(norm: str, engine: str) -> None:
    model, (batch, meta_batch) = Checkpointed(NORMS[norm]), inputs.pair(5, 3, 2, 3, classes=3)
    plain = copy.deepcopy(model)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()
    settings: dict[str, Any] = dict(weight_optimizer=None, virtual_lr=0.1, engine=engine)
    metakern.mwnet_step(model, net, batch, meta_batch, **settings)
    F.cross_entropy(plain(batch[0]), batch[1]).backward()
    require_same_buffers(model, plain)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clean", [False, True])
def test_so_they_are_after_label_correction(fused: bool, clean: bool) -> None:
    """Clean examples beside the others do not count."""
    model, (batch, meta_batch) = Checkpointed(NORMS["batch"]), inputs.pair(5, 3, 2, 3, classes=3)
    plain = copy.deepcopy(model)
    settings: dict[str, Any] = dict(label_optimizer=None, virtual_lr=0.1, clean_batch=meta_batch if clean else None)
    metakern.mlc_step(model, LabelNet(3).double(), batch, meta_batch, fused=fused, **settings)
    F.cross_entropy(plain(batch[0]), batch[1]).backward()
    require_same_buffers(model, plain)


def require_same_buffers(model: nn.Module, plain: nn.Module) -> None:
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        budget.assert_within(found.double(), expected.double(), 1 + expected.double().abs(), name=name)
