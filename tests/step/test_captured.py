"""Captured steps: what can be known without a GPU, and the same trajectory as uncaptured ones on one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import metakern
from metakern.capture.parameters import trainable_parameters
from metakern.capture.state import random_state
from metakern.ops.select import Operator
from metakern.ops.waiting import host_may_wait, without_waiting
from metakern.step.hand_over import stale
from metakern.step.programs import captured
from metakern.step.programs.assumptions import Assumptions
from metakern.step.programs.captured import CapturedStep
from metakern.step.programs.captured_optimizer import optimizer_as_before
from metakern.step.programs.own_batches import OwnBatches
from metakern.step.result import StepResult
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
    with without_waiting():
        judge_step(metakern.l2rw_step, setup)
        # past the dispatcher, so that what the operators call is seen as well
        monkeypatch.setattr(Operator, "__call__", lambda self, *given, impl=None: self.run(*given, impl=impl))
        with HostWaits() as waits:
            metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch)
    assert waits.met == []


def test_an_unproven_model_is_not_captured() -> None:
    model, (batch, meta) = network(), batches()
    with pytest.raises(NotImplementedError, match="CUDA graph"), without_waiting():
        metakern.l2rw_step(model, batch, meta, engine="ghost")


def test_rehearsal_finds_the_engine_of_the_capture() -> None:
    """Rows that may be picked by data are looked up in every pass; where they cannot be, forward mode serves."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, order, y = batch
        return F.cross_entropy(model(x)[order], y, reduction="none")

    model, given = network(), [(x, torch.arange(len(x)), y) for x, y in batches()]
    step = partial(metakern.l2rw_step, model, *given, loss_fn=losses)
    assert step().engine == "ghost"
    assert captured.rehearse(step) == "jvp"
    with pytest.raises(RuntimeError, match=r"cannot be captured into a CUDA graph: .*looked up in every pass"):
        captured.rehearse(partial(step, engine="ghost"))
    assert host_may_wait()


def test_a_call_that_a_graph_would_repeat_with_other_numbers_is_refused() -> None:
    """The derivative of a recurrent layer is taken by running it again, with the dropout masks of the first run."""
    torch.manual_seed(0)
    cell = nn.LSTM(28, 10, num_layers=2, dropout=0.5, batch_first=True).double()
    given = [((x.squeeze(1), y), lambda model, batch: model(batch[0])[0].sum((1, 2))) for x, y in batches()]
    (batch, loss_fn), (meta_batch, _) = given
    assert metakern.l2rw_step(cell, batch, meta_batch, loss_fn=loss_fn).engine == "ghost"
    with pytest.raises(NotImplementedError, match="lstm draws random numbers"), without_waiting():
        metakern.l2rw_step(cell, batch, meta_batch, loss_fn=loss_fn, engine="ghost")


def test_refuses_a_model_that_is_not_on_one_gpu() -> None:
    with pytest.raises(ValueError, match=r"parameter '.*' is on cpu; a CUDA graph"):
        metakern.capture_step(network(), *batches())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        first, second = (
            nn.Parameter(FakeTensor(mode, torch.empty(3, device="meta"), torch.device("cuda", k))) for k in range(2)
        )
    assert captured._device_of({"first": first}, [first, 3]) == torch.device("cuda:0")
    with pytest.raises(ValueError, match=r"parameter 'second' is on cuda:1, others on cuda:0"):
        captured._device_of({"first": first, "second": second}, [])
    with pytest.raises(ValueError, match=r"tensor 1 is on cuda:0; put it on the model's device"):
        captured._device_of({"second": second}, [second, first])


class Cuda:
    """Stands for `torch.cuda` where there is none: notes what it is asked, and lets what is captured run."""

    Stream = CUDAGraph = MagicMock

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.met: list[Any] = []
        for name in ("Stream", "CUDAGraph", "device", "stream", "graph", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.met.append)
        monkeypatch.setattr(captured, "_device_of", lambda *_: torch.device("cuda:1"))

    def device(self, device: torch.device) -> Any:
        self.met.append(str(device))
        return nullcontext()

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def current_stream(self) -> Any:
        return MagicMock()

    @contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.met.append("capture")
        try:
            with without_waiting():
                yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error


def test_a_capture_is_rehearsed_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, model, given = Cuda(monkeypatch), network(), batches()

    def noted(*given: Any, **settings: Any) -> StepResult:
        cuda.met.append("may wait" if host_may_wait() else "may not")
        return metakern.reweight_step(*given, **settings)

    monkeypatch.setattr(captured, "reweight_step", noted)
    step = metakern.capture_step(model, *given)
    assert cuda.met == ["cuda:1", *captured.WARM_UP * ["may wait"], "error", "may not", 0, "capture", "may not"]
    assert torch.equal(step._result.weights, metakern.l2rw_step(model, *given).weights)


class Remembering(nn.Module):
    """A network whose output depends on the number of the pass, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way, self.passes = network(), way, 0
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "attribute":
            self.passes += 1
        elif self.way == "buffer replaced":
            self.scale = self.scale * 0.9
        drawn = {"Python": random.random, "NumPy": np.random.random}.get(self.way, float)()
        return self.inner(x) * self.scale * (1 + drawn + 0.1 * self.passes)


@pytest.mark.parametrize("way", ["Python", "NumPy", "attribute", "buffer replaced", "loss"])
def test_what_a_replay_would_not_change_is_refused_and_taken_back(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A graph holds the numbers that Python had in the capture."""
    Cuda(monkeypatch)
    model, calls = Remembering(way), [1.0]

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if way == "loss":
            calls[0] *= 0.9
        return calls[0] * F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    scale, before = model.scale, random_state.random_state()
    with pytest.raises(NotImplementedError, match=r"captured|buffers"):
        metakern.capture_step(model, *batches(), loss_fn=losses)
    assert model.scale is scale
    assert float(scale) == 1.0
    assert calls == [1.0]
    assert random_state.same_state(before, random_state.random_state())


def test_a_capture_leaves_no_trace_in_what_a_loss_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch)
    bank = torch.zeros(10, dtype=torch.float64)

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        out = model(batch[0])
        bank.mul_(0.9).add_(0.1 * out.detach().mean(0))
        return F.cross_entropy(out, batch[1], reduction="none")

    metakern.capture_step(network(), *batches(), loss_fn=losses)
    # what remains of the capture, whose kernels run here and would not on a GPU
    once = bank.clone()
    bank.zero_()
    metakern.capture_step(network(), *batches(), loss_fn=losses)
    assert torch.equal(bank, once)


def test_a_failed_capture_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, model = Cuda(monkeypatch), network()

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if cuda.met[-1] == "capture":
            raise RuntimeError("not permitted")
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph: not permitted"):
        metakern.capture_step(model, *batches(), loss_fn=losses)


def fake(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> tuple[CapturedStep, list[int]]:
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

    def assumptions() -> Assumptions:
        return Assumptions(model, None, "softmax", places=True)

    others = partial(stale, model, trainable_parameters(model), optimizer)
    return CapturedStep(replay, own, gradient, result, assumptions, others), calls


def test_replay_takes_the_new_batch_and_hands_out_its_own_tensors() -> None:
    model = network()
    step, calls = fake(model)
    model.zero_grad(set_to_none=True)
    judgement = judge_step(lambda model, *given, loss_fn: step(*given), Setup(model, *batches(seed=1)))
    assert calls == [1]
    kept = judgement.result.weights.clone()
    step(*batches(seed=2))
    assert torch.equal(judgement.result.weights, kept)


def test_earlier_gradients_of_others_are_removed() -> None:
    """The optimizer would apply them in every step."""
    model = network()
    frozen, outside = model[0].bias.requires_grad_(False), nn.Parameter(torch.ones(3))
    step, _ = fake(model, torch.optim.SGD([*model.parameters(), outside], 0.1))
    frozen.grad, outside.grad = torch.ones_like(frozen), torch.ones(3)
    step(*batches())
    assert frozen.grad is None
    assert outside.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, m: ((b[0][:4], b[1][:4]), m), r"made with torch.float64 of shape \(8, 1, 28, 28\) at position 0"),
        (lambda b, m: ((b[0].float(), b[1]), m), "torch.float32"),
        (lambda b, m: ({"x": b[0]}, m), "must be nested like the captured ones"),
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


def test_a_capture_leaves_earlier_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch)
    model, outside = network(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), outside], 0.1)
    frozen = model[0].bias.requires_grad_(False)
    frozen.grad, outside.grad = torch.ones_like(frozen), torch.ones(3)
    grads = [frozen.grad, outside.grad]
    metakern.capture_step(model, *batches(), optimizer=optimizer)
    assert frozen.grad is grads[0]
    assert outside.grad is grads[1]


@pytest.mark.parametrize("replace", [lambda o: o.load_state_dict(deepcopy(o.state_dict())), lambda o: o.state.clear()])
@pytest.mark.parametrize("kind", [partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam])
def test_refuses_state_of_an_optimizer_that_lies_elsewhere(kind: Any, replace: Any) -> None:
    """The graph would go on writing into the memory of the old one."""
    model = network()
    optimizer = kind(model.parameters(), lr=0.1)
    metakern.l2rw_step(model, *batches(), optimizer=optimizer)
    replace(optimizer)  # once before as well: what `load_state_dict` makes has its keys in another order
    if not optimizer.state:
        metakern.l2rw_step(model, *batches(), optimizer=optimizer)
    known = captured.assumptions_of(model, None, "softmax", optimizer)
    known.require(captured.assumptions_of(model, None, "softmax", optimizer))
    replace(optimizer)
    with pytest.raises(ValueError, match="rule or optimizer"):
        known.require(captured.assumptions_of(model, None, "softmax", optimizer))


@pytest.mark.parametrize(
    ("engine", "dropout", "refused"), [("jvp", 0.5, True), ("jvp", 0.0, False), ("ghost", 0.5, False)]
)
def test_draws_that_forward_mode_would_repeat_are_refused(engine: str, dropout: float, refused: bool) -> None:
    """Both passes of forward mode must see one mask, and a graph draws two."""
    model = nn.Sequential(network(), nn.Dropout(dropout))
    before = random_state.random_state()
    used = metakern.l2rw_step(model, *batches(), engine=engine).engine
    draws = not random_state.same_torch_state(before, random_state.random_state())
    with pytest.raises(NotImplementedError, match="a CUDA graph draws twice") if refused else nullcontext():
        captured._require_no_repeated_draws(used, draws)


def test_state_made_inside_a_capture_is_refused_and_taken_back() -> None:
    model, (batch, meta) = network(), batches()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="must have taken a step"), optimizer_as_before(optimizer):
        metakern.l2rw_step(model, batch, meta, optimizer=optimizer)
    assert not optimizer.state
    metakern.l2rw_step(model, batch, meta, optimizer=optimizer)
    with optimizer_as_before(optimizer):
        metakern.l2rw_step(model, batch, meta, optimizer=optimizer)


class Decaying(torch.optim.SGD):
    """Counts steps in Python, in its state or in its groups."""

    def __init__(self, parameters: Any, place: str) -> None:
        super().__init__(parameters, 0.1)
        self.place = place

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for held in (group,) if self.place == "group" else map(self.state.__getitem__, group["params"]):
                held["taken"] = held.get("taken", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: torch.optim.Adagrad(p, lr_decay=0.1), "step"),
        (lambda p: Decaying(p, "state"), "taken"),
        (lambda p: Decaying(p, "group"), "taken"),
    ],
)
def test_an_optimizer_that_counts_on_the_host_is_refused_and_taken_back(make: Any, name: str) -> None:
    """A graph would decay by the count of the capture for ever. (Parameters on "meta", as on any device.)"""
    p = nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones_like(p)
    optimizer = make([p])
    optimizer.step()
    before = deepcopy(optimizer.state_dict())
    kind = type(optimizer).__name__
    with pytest.raises(ValueError, match=f"{kind} keeps {name} on the host"), optimizer_as_before(optimizer):
        optimizer.step()
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].get(0, {}).get(name) == before["state"].get(0, {}).get(name)
    with optimizer_as_before(optimizer):
        pass


def test_numbers_of_the_host_are_taken_for_granted_by_a_graph() -> None:
    """A learning rate in a tensor of the CPU is read when a kernel is launched, which a replay does not do again."""
    rate, count = torch.tensor(0.1), torch.zeros(3)
    step = CapturedStep(
        lambda: None, OwnBatches(), {}, StepResult(*[count] * 4, "ghost"),
        lambda: Assumptions(nn.Identity(), None, "softmax", {"lr": rate, "count": count}, places=True), list,
    )  # fmt: skip
    count += 1
    step._known.require(step._assumptions())
    rate.mul_(0.5)
    with pytest.raises(ValueError, match="make another step"):
        step._known.require(step._assumptions())


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

    model, stream = Waits().cuda(), torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="cannot be captured"):
        metakern.capture_step(model, *batches(device="cuda"))
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.nn.functional.dropout(torch.ones(3, device="cuda"))  # the generator works on
    metakern.l2rw_step(model, *batches(device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("other", [False, True])
def test_captures_on_the_device_of_the_model(other: bool) -> None:
    """Whatever device is the current one, and whatever device the first capture of the process was on."""
    if other and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    device = f"cuda:{int(other)}"
    model, first, second = network(device), batches(0, device), batches(1, device)
    step = metakern.capture_step(model, *first)
    weights = step(*second).weights
    want = metakern.l2rw_step(model, *second).weights
    budget.assert_within(weights, want, 1.0)
