"""A step over two processes is the step of one process that sees both their batches."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import metakern
from metakern.testing import budget, inputs


def _rank(rank: int, rendezvous: str, engine: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    (x, y), (meta_x, meta_y) = inputs.pair(8, 4, 5, classes=3)
    mine, meta = (slice(0, 5), slice(0, 2)) if rank == 0 else (slice(5, 8), slice(2, 4))
    group = dist.group.WORLD
    part = metakern.l2rw_step(
        model, (x[mine], y[mine]), (meta_x[meta], meta_y[meta]), engine=engine, process_group=group
    )
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    whole = metakern.l2rw_step(model, (x, y), (meta_x, meta_y), engine=engine)
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    budget.assert_within(part.dots, whole.dots[mine], whole.dots.abs().max())
    budget.assert_within(part.weights, whole.weights[mine], 1.0)
    budget.assert_within(gradient, want, want.abs().max())
    dist.destroy_process_group()


@pytest.mark.parametrize("engine", ["ghost", "jvp"])
def test_two_ranks_with_batches_of_different_sizes(engine: str, tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path / "rendezvous"), engine), nprocs=2)
