"""A step over two processes is the step of one process that sees both their batches."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.capture.refusal import EngineUnavailable
from metakern.engines import ghost
from metakern.testing import budget, inputs
from metakern.testing.judge import Snapshot


class Experts(nn.Module):
    """The sign of the first feature selects the layer of an example, and with it the one that goes without a gradient;
    the gradients of `a` and `b` are one tensor, and that of `scale` is one number, expanded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 3)
        self.a, self.b, self.scale = (nn.Parameter(torch.randn(7)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        hidden = x.new_zeros(len(x), 7)
        for expert, rows in ((self.first, chosen), (self.second, ~chosen)):
            if rows.any():
                hidden = hidden + rows[:, None] * expert(x)
        return self.head(torch.tanh(hidden * (self.a + self.b) * self.scale.sum()))


def _problem() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Rank 0 has meta examples of one expert, rank 1 of both."""
    torch.manual_seed(0)
    model = Experts().double()
    (x, y), (meta_x, meta_y) = inputs.pair(8, 5, 5, classes=3)
    x[:, 0] = torch.tensor([1.0, -1.0] * 4)
    meta_x[:, 0] = torch.tensor([-1.0, -1.0, 1.0, -1.0, 1.0])
    return model, (x, y), (meta_x, meta_y)


def _rank(rank: int, rendezvous: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model, (x, y), (meta_x, meta_y) = _problem()
    mine, meta = (slice(0, 5), slice(0, 2)) if rank == 0 else (slice(5, 8), slice(2, 5))
    group = dist.group.WORLD
    part = metakern.reweight_step(
        model, (x[mine], y[mine]), (meta_x[meta], meta_y[meta]), process_group=group, **settings
    )
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    whole = metakern.reweight_step(model, (x, y), (meta_x, meta_y), **settings)
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    budget.assert_within(part.dots, whole.dots[mine], whole.dots.abs().max())
    budget.assert_within(part.weights, whole.weights[mine], 1.0)
    budget.assert_within(gradient, want, want.abs().max())
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "settings",
    [{"engine": "ghost"}, {"engine": "ghost", "micro_batch": 2}, {"engine": "jvp"}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_two_ranks_with_batches_of_different_sizes(settings: dict[str, Any], tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path / "rendezvous"), settings), nprocs=2)


def _one_fails(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    given = {"init_method": f"file://{rendezvous}", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **given)
    model, (x, y), (meta_x, meta_y) = _problem()
    mine, meta = (slice(0, 5), slice(0, 2)) if rank == 0 else (slice(5, 8), slice(2, 5))
    errors = []
    for fails in ("", "loss", "gradient", "rule", ""):

        def losses(model: nn.Module, batch: tuple[Tensor, Tensor], fails: str = fails) -> Tensor:
            each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
            if rank == 0 and fails == "loss":
                raise KeyError("a label")
            return each + (0 * each).sqrt() if len(each) == 5 and fails == "gradient" else each

        def rule(dots: Tensor, fails: str = fails) -> Tensor:
            assert not (rank == 1 and fails == "rule")
            return torch.ones_like(dots)

        before = Snapshot.of(model)
        try:
            metakern.reweight_step(
                *(model, (x[mine], y[mine]), (meta_x[meta], meta_y[meta])),
                **{"loss_fn": losses, "rule": rule, "process_group": dist.group.WORLD},
            )
        except Exception as error:
            before.assert_unchanged(model)
            errors.append(type(error).__name__)
    others = "OtherRankFailed"
    assert errors == (["KeyError", "ValueError", others] if rank == 0 else [others, others, "AssertionError"])
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    metakern.reweight_step(model, (x, y), (meta_x, meta_y), rule=torch.ones_like)
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    budget.assert_within(gradient, want, want.abs().max())
    dist.destroy_process_group()


def test_a_rank_that_fails_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    """And the step after it is in step again."""
    mp.spawn(_one_fails, args=(str(tmp_path / "rendezvous"),), nprocs=2, join=True)


def _one_goes_another_way(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    given = {"init_method": f"file://{rendezvous}", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **given)
    meta_pass = ghost._meta_pass

    def rejected(*given: Any, **settings: Any) -> Any:
        meta_pass(*given, **settings)
        raise EngineUnavailable("for the test")

    model, batch, meta_batch = _problem()
    before = Snapshot.of(model)
    if rank == 0:
        ghost._meta_pass = rejected
    with pytest.raises(RuntimeError, match="an engine was rejected on some of the ranks only"):
        metakern.l2rw_step(model, batch, meta_batch, process_group=dist.group.WORLD)
    before.assert_unchanged(model)
    ghost._meta_pass = meta_pass
    found = []
    for group in (dist.group.WORLD, None):  # both ranks have the same examples, so that each counts half
        assert metakern.l2rw_step(model, batch, meta_batch, process_group=group).engine == "ghost"
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    budget.assert_within(found[0], found[1], found[1].abs().max())
    dist.destroy_process_group()


def test_an_engine_that_is_rejected_late_on_one_rank(tmp_path: Path) -> None:
    """It takes the next engine, whose reductions would meet those of another place."""
    mp.spawn(_one_goes_another_way, args=(str(tmp_path / "rendezvous"),), nprocs=2, join=True)
