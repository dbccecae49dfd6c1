"""Captured steps: what can be known without a GPU, and the same trajectory as uncaptured ones on one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import metakern
from metakern import weighted_grad
from metakern.capture import examples, losses, random_state
from metakern.step import captured, finite
from metakern.step.captured import CapturedStep
from metakern.step.granted import Granted
from metakern.step.own_batches import OwnBatches
from metakern.testing import budget, inputs, models
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

HOST_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::item"}


def batches(seed: int = 0, device: str = "cpu") -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    batch, meta_batch = inputs.pair(8, 3, 1, 28, 28, classes=10, seed=seed)
    return (batch[0].to(device), batch[1].to(device)), (meta_batch[0].to(device), meta_batch[1].to(device))


def network(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return models.lenet(10).double().to(device)


class HostWaits(TorchDispatchMode):
    """Counts operations that bring a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name in HOST_WAITS:
            self.met.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_that_may_not_wait_reads_nothing_and_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(network(), *batches())
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch)
    for module in (losses, examples, finite, weighted_grad, random_state):
        monkeypatch.setattr(module, "host_may_wait", lambda: False)
    judge_step(metakern.l2rw_step, setup)
    with HostWaits() as waits:
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch)
    assert waits.met == []


def test_an_unproven_model_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (batch, meta) = network(), batches()
    monkeypatch.setattr(examples, "host_may_wait", lambda: False)
    with pytest.raises(NotImplementedError, match="CUDA graph"):
        metakern.l2rw_step(model, batch, meta, engine="ghost")


def test_refuses_a_model_that_is_not_on_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"parameter '.*' is on cpu; a CUDA graph"):
        metakern.capture_step(network(), *batches())


def fake(model: nn.Module) -> tuple[CapturedStep, list[int]]:
    """A captured step whose replay runs the step itself, into the memory of the first."""
    batch, meta_batch = batches()
    own = OwnBatches(batch=batch, meta_batch=meta_batch)
    result = metakern.l2rw_step(model, *own.built())
    gradient = {p: p.grad for p in model.parameters() if p.grad is not None}
    calls: list[int] = []

    def replay() -> None:
        calls.append(1)
        new = metakern.l2rw_step(model, *own.built())
        for p, grad in gradient.items():
            assert p.grad is not None
            grad.copy_(p.grad)
        for old, value in zip(result[:4], new[:4], strict=True):
            old.copy_(value)

    return CapturedStep(replay, own, gradient, result, lambda: Granted(model, None, "softmax", places=True)), calls


def test_replay_takes_the_new_batch_and_hands_out_its_own_tensors() -> None:
    model = network()
    step, calls = fake(model)
    model.zero_grad(set_to_none=True)
    judgement = judge_step(lambda model, *given, loss_fn: step(*given), Setup(model, *batches(seed=1)))
    assert calls == [1]
    kept = judgement.result.weights.clone()
    step(*batches(seed=2))
    assert torch.equal(judgement.result.weights, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, m: ((b[0][:4], b[1][:4]), m), r"made with torch.float64 of shape \(8, 1, 28, 28\) in place 0"),
        (lambda b, m: ((b[0].float(), b[1]), m), "torch.float32"),
        (lambda b, m: ({"x": b[0]}, m), "must be built as the captured ones"),
    ],
)
def test_refuses_other_batches_before_anything_changes(change: Any, message: str) -> None:
    step, calls = fake(network())
    with pytest.raises(ValueError, match=message):
        step(*change(*batches()))
    assert not calls


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[0].weight, "data", model[0].weight.data.clone()),
        lambda model: setattr(model[0], "padding", (0, 0)),
        lambda model: model.eval(),
    ],
)
def test_refuses_a_model_that_a_graph_would_not_see_change(change: Any) -> None:
    model = network()
    step, calls = fake(model)
    change(model)
    with pytest.raises(ValueError, match="make another step"):
        step(*batches())
    assert not calls


@pytest.mark.parametrize(
    ("engine", "dropout", "refused"), [("jvp", 0.5, True), ("jvp", 0.0, False), ("ghost", 0.5, False)]
)
def test_draws_that_forward_mode_would_repeat_are_refused(engine: str, dropout: float, refused: bool) -> None:
    """Both passes of forward mode must see one mask, and a graph draws two."""
    model = nn.Sequential(network(), nn.Dropout(dropout))
    before = random_state.random_state()
    used = metakern.l2rw_step(model, *batches(), engine=engine).engine
    after = random_state.random_state()
    with pytest.raises(NotImplementedError, match="a CUDA graph draws twice") if refused else nullcontext():
        captured._require_no_repeated_draws(used, before, after)


def test_state_made_inside_a_capture_is_refused_and_taken_back() -> None:
    model, (batch, meta) = network(), batches()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="must have taken a step"), captured._optimizer_as_before(optimizer):
        metakern.l2rw_step(model, batch, meta, optimizer=optimizer)
    assert not optimizer.state
    metakern.l2rw_step(model, batch, meta, optimizer=optimizer)
    with captured._optimizer_as_before(optimizer):
        metakern.l2rw_step(model, batch, meta, optimizer=optimizer)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_follows_uncaptured_steps(kind: str) -> None:
    def run(capture: bool) -> list[Tensor]:
        model = network("cuda")
        make = {
            "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
            "adam": lambda p: torch.optim.Adam(p, 1e-3, capturable=True),
        }[kind]
        optimizer = make(model.parameters())
        first = batches(99, "cuda")
        metakern.l2rw_step(model, *first, optimizer=optimizer)
        step = metakern.capture_step(model, *first, optimizer=optimizer) if capture else None
        for seed in range(5):
            given = batches(seed, "cuda")
            if step is None:
                metakern.l2rw_step(model, *given, optimizer=optimizer)
            else:
                step(*given)
        return [p.detach().cpu() for p in model.parameters()]

    for got, want in zip(run(True), run(False), strict=True):
        budget.assert_within(got, want, 1 + want.abs(), dtype=torch.float64)


NETWORKS = {
    "autocast": lambda: models.lenet(10).float(),
    "batch norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 10)
    ),
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Dropout(0.5), nn.Linear(8, 10)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_captures_autocast_batch_norm_and_dropout(name: str) -> None:
    """Dropout of probability 0.5 draws other masks in every replay, so only that it goes on is held there."""
    torch.manual_seed(0)
    model = NETWORKS[name]().cuda()
    first, second = (((x.float(), y), (u.float(), v)) for (x, y), (u, v) in (batches(k, "cuda") for k in range(2)))
    with torch.autocast("cuda", torch.bfloat16, enabled=name == "autocast", cache_enabled=False):
        step = metakern.capture_step(model, *first)
        got = step(*second)
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        want = metakern.l2rw_step(model, *second)
    if name == "dropout":
        assert not torch.equal(step(*second).losses, got.losses)
        return
    # Only the order of sums may differ; autocast rounds operands to bfloat16 alike in both.
    dtype = torch.bfloat16 if name == "autocast" else torch.float32
    for one, p in zip(grads, model.parameters(), strict=True):
        assert p.grad is not None
        budget.assert_within(one, p.grad, float(p.grad.norm()), dtype=dtype)
    budget.assert_within(got.losses, want.losses, 1 + want.losses, dtype=dtype)


@pytest.mark.gpu
def test_refuses_batch_norm_with_dropout() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10))
    with pytest.raises(NotImplementedError, match="a CUDA graph draws twice"):
        metakern.capture_step(model.double().cuda(), *batches(device="cuda"))


@pytest.mark.gpu
def test_a_model_that_waits_says_why() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (1.0 if x.sum().item() > 0 else 2.0)

    with pytest.raises(RuntimeError, match="cannot be captured"):
        metakern.capture_step(Waits().cuda(), *batches(device="cuda"))
