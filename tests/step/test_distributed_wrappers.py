"""Wrappers that average gradients over processes in a backward pass of their own are rejected wherever they are."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import DistributedDataParallel

import metakern
from metakern.testing import inputs
from metakern.testing.judge import Snapshot

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DistributedDataParallel": DistributedDataParallel,
    "FullyShardedDataParallel": partial(
        FullyShardedDataParallel, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.NO_SHARD
    ),
}


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_rejected(model: nn.Module, match: str, process_group: dist.ProcessGroup | None) -> None:
    before = Snapshot.of(model)
    for engine in ("auto", "jvp", "double_backward"):
        with pytest.raises(TypeError, match=match):
            metakern.l2rw_step(model, *inputs.pair(5, 3, 4, classes=3), engine=engine, process_group=process_group)
    before.assert_unchanged(model, random=False)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_inside_a_model(kind: str, grouped: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), WRAPPERS[kind](nn.Linear(5, 3)))
    assert_rejected(model, rf"module '1' is a {kind}.*process_group", dist.group.WORLD if grouped else None)


def test_a_sharded_model() -> None:
    model = WRAPPERS["FullyShardedDataParallel"](nn.Linear(4, 3))
    assert_rejected(model, r"the model is a FullyShardedDataParallel.*process_group", None)
