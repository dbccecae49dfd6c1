"""Compiled steps of models that write buffers, and of passes that are repeated: forward mode, checkpointed layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metakern
from metakern.step.programs.program import Program
from metakern.testing import budget, inputs
from metakern.testing.judge import Snapshot

# What inductor does to a program but the code: in-place writes become values, views are followed.
compile_step = partial(metakern.compile_step, backend="aot_eager")


def batches(seed: int = 0) -> Any:
    return inputs.pair(8, 3, 6, classes=3, seed=seed)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


class Centred(nn.Module):
    """Keeps a running mean, written in place or by a part, and a count."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("centre", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.write(self.centre, x.detach().mean(0))
        return x - self.centre


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, x.flip(-1)], 1)
        return self.inner(x, x, x, need_weights=False)[0].mean(1)


class Listed(nn.Module):
    """Holds a normalisation in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [nn.BatchNorm1d(6, affine=False).double()]

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x)


def shared() -> nn.Module:
    norm = nn.BatchNorm1d(6)
    return nn.Sequential(norm, nn.Linear(6, 6), norm)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "batch norm, dropout": lambda: nn.Sequential(nn.Dropout(0.4), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2)),
    "attention with dropout": lambda: nn.Sequential(Attention(), nn.BatchNorm1d(6)),
    "one norm, twice": shared,
    "in a list": Listed,
    "no affine, no statistics": lambda: nn.BatchNorm1d(6, affine=False, track_running_stats=False),
    "checkpointed dropout": lambda: Checkpointed(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh())),
    "checkpointed batch norm": lambda: Checkpointed(nn.Sequential(nn.BatchNorm1d(6), nn.Tanh())),
    "alpha dropout": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.AlphaDropout(0.3)),
    "whole": lambda: Centred(lambda centre, mean: centre.mul_(0.9).add_(mean, alpha=0.1)),
    "part": lambda: Centred(lambda centre, mean: centre[:2].copy_(mean[:2])),
    "data": lambda: Centred(lambda centre, mean: centre.data.lerp_(mean, 0.1)),
    "with batch norm": lambda: nn.Sequential(Centred(Tensor.copy_), nn.BatchNorm1d(6)),
}


def network(kind: str) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), NETWORKS[kind](), nn.Tanh(), nn.Linear(6, 3)).double()


def buffers(model: nn.Module) -> list[Tensor]:
    found = list(model.buffers())
    for module in model.modules():
        if isinstance(module, Listed):
            found += module.held[0].buffers()
    return found


def assert_same(got: Any, want: Any) -> None:
    for one, other in zip(got, want, strict=True):
        if other.is_floating_point():
            budget.assert_within(one, other, 1 + other.abs(), dtype=torch.float64)
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_run_is_that_of_uncompiled_steps(kind: str) -> None:
    """Dots, weights, gradients, buffers and the generator, over steps that move all of them."""
    model = network(kind)
    before = Snapshot.of(model)
    step = compile_step(model, *batches())
    before.assert_unchanged(model)
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, other)]
    for seed in range(3):
        torch.manual_seed(seed)
        got, left = step(*batches(seed)), torch.get_rng_state()
        torch.manual_seed(seed)
        want = metakern.reweight_step(other, *batches(seed))
        assert torch.equal(left, torch.get_rng_state())
        assert got.engine == want.engine
        assert_same(got[:4], want[:4])
        assert_same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
        assert_same(buffers(model), buffers(other))
        for optimizer in optimizers:
            optimizer.step()


def test_a_batch_that_is_taken_uncompiled_counts_once() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses if bool(batch[0][0, 0] > 5) else 2 * losses

    model = network("with batch norm")
    step, other = compile_step(model, *batches(), loss_fn=loss_fn), copy.deepcopy(model)
    (x, y), meta_batch = batches()
    x[0] = 6
    got, want = step((x, y), meta_batch), metakern.reweight_step(other, (x, y), meta_batch, loss_fn=loss_fn)
    assert_same(got[:4], want[:4])
    assert_same(buffers(model), buffers(other))


def test_a_step_that_fails_leaves_buffers_as_they_were() -> None:
    model = network("with batch norm")
    step = compile_step(model, *batches())
    before, ((x, y), meta_batch) = Snapshot.of(model), batches()
    x[1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        step((x, y), meta_batch)
    before.assert_unchanged(model)


def test_a_program_that_gives_other_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Program.__call__
    monkeypatch.setattr(Program, "__call__", lambda *given: ([1.001 * r for r in part or ()] for part in run(*given)))
    model = network("whole")
    before = Snapshot.of(model)
    with pytest.raises(NotImplementedError, match="other values than the step"):
        compile_step(model, *batches())
    before.assert_unchanged(model)


def test_draws_that_depend_on_values_and_are_repeated_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.RReLU(), nn.Linear(6, 3)).double()
    before, state = Snapshot.of(model), torch.get_rng_state()
    with pytest.raises(NotImplementedError, match="repeats other draws"):
        compile_step(model, *batches())
    before.assert_unchanged(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
def test_an_engine_asked_for_by_name(engine: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    step = compile_step(model, *batches(), engine=engine)
    got, want = step(*batches(1)), metakern.reweight_step(model, *batches(1), engine=engine)
    assert got.engine == want.engine == engine
    assert_same(got[:4], want[:4])


def test_ghost_by_name_is_refused_where_examples_interact() -> None:
    with pytest.raises(NotImplementedError, match="examples interact"):
        compile_step(network("batch norm"), *batches(), engine="ghost")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
def test_inductor_takes_one_mask_for_dots_and_gradient() -> None:
    """sum_n w_n dots_n is the product of gradient and meta gradient, if all are of the same masks."""

    def loss_fn(model: Any, batch: Any) -> Tensor:
        x = model[:4](batch[0])
        return nn.functional.cross_entropy(model[4:](x) if len(x) == 8 else model[5:](x), batch[1], reduction="none")

    torch.manual_seed(0)
    layers = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 9), nn.Dropout(0.5), nn.Linear(9, 3)
    model = nn.Sequential(*layers).double()
    step = metakern.compile_step(model, *batches(), loss_fn=loss_fn)
    seen = []
    for _ in range(3):
        other: Any = copy.deepcopy(model)
        v = torch.autograd.grad(loss_fn(other, batches()[1]).mean(), list(other.parameters()))
        result = step(*batches())
        along = torch.stack([(p.grad * g).sum() for p, g in zip(model.parameters(), v, strict=True)]).sum()
        budget.assert_within((result.weights * result.dots).sum(), along, 1 + along.abs(), dtype=torch.float64)
        seen.append(result.losses)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_of_the_optimizer_see_the_buffers_of_the_step(fails: bool) -> None:
    """As in an uncompiled step: an average of weights and buffers may be taken there."""
    model, (batch, meta_batch) = nn.Sequential(Centred(lambda centre, x: centre.add_(x)), nn.Linear(6, 3)), batches()
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step, seen = compile_step(model, batch, meta_batch, optimizer=optimizer), []

    def hook(*_: Any) -> None:
        seen.append(int(model[0].count))
        if fails:
            raise OSError("no average today")

    optimizer.register_step_post_hook(hook)
    before = model[0].centre.clone()
    with pytest.raises(OSError, match="no average") if fails else nullcontext():
        step(batch, meta_batch)
    assert seen == [1]
    assert torch.equal(model[0].centre, before) == fails
    assert int(model[0].count) == (0 if fails else 1)
