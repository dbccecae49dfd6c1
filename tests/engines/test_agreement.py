"""The first batch of a structure is held against a plain backward pass: what an engine has wrong is not silent."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import metakern
from metakern import dots as stage_dots
from metakern.capture.refusal import EngineUnavailable
from metakern.engines import agreement, implicit
from metakern.layers import generic, table
from metakern.step import meta_pass
from metakern.step.direction import with_weight_decay
from metakern.testing import inputs
from metakern.testing.judge import Snapshot


class Scale(nn.Module):
    """x * weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Tripled(Function):
    """A forward mode that is wrong, and a backward pass that cannot be differentiated to find out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * tangent


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Tripled.apply(x)


def network(middle: nn.Module) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), middle, nn.Linear(5, 3)).double()
    return model, *inputs.pair(6, 3, 4, classes=3)


def half(function: Any) -> Any:
    def wrong(*args: Any) -> Any:
        found = function(*args)
        return 0.5 * found if isinstance(found, Tensor) else {key: 0.5 * g for key, g in found.items()}

    return wrong


@pytest.fixture
def registered(request: pytest.FixtureRequest) -> Iterator[None]:
    """Scale is served by a rule that has its dots, or its gradient, wrong."""
    dots = half(generic.dots) if request.param == "dots" else generic.dots
    grads = half(generic.weighted_grads) if request.param == "gradient" else generic.weighted_grads
    metakern.register_layer(Scale, metakern.LayerRule(lambda call: True, dots, grads))
    yield
    del table._BY_MODULE[Scale]
    table.REGISTERED.discard(Scale)


WRONG = pytest.mark.parametrize("registered", ["dots", "gradient"], indirect=True)


def weight_net_step(model: nn.Module, *batches: Any, engine: str) -> Any:
    with torch.random.fork_rng(devices=()):
        net = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
    return metakern.mwnet_step(model, net, *batches, weight_optimizer=None, virtual_lr=0.1, engine=engine)


def step_along(model: nn.Module, *batches: Any, engine: str) -> Any:
    return metakern.reweight_step(model, *batches, direction=with_weight_decay(model, 0.1), engine=engine)


STEPS: dict[str, Callable[..., Any]] = {
    "l2rw": metakern.l2rw_step,
    "along": step_along,
    "weight net": weight_net_step,
    "by parts": partial(metakern.l2rw_step, micro_batch=3),
    "tangents": lambda *given, engine: metakern.logit_tangents(*given),
}


@WRONG
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("step", ["l2rw", "along", "weight net"])
def test_a_layer_rule_that_is_wrong(step: str) -> None:
    model, batch, meta_batch = network(Scale())
    before = Snapshot.of(model)
    for _ in range(2):  # the second time without asking anew
        with pytest.raises(EngineUnavailable, match="disagrees with a plain backward pass"):
            STEPS[step](model, batch, meta_batch, engine="ghost")
        before.assert_unchanged(model)
    assert metakern.l2rw_step(model, batch, meta_batch).engine == "jvp"


@pytest.mark.parametrize("registered", ["dots"], indirect=True)
@pytest.mark.usefixtures("registered")
def test_a_layer_rule_that_is_wrong_by_parts() -> None:
    model, batch, meta_batch = network(Scale())
    with pytest.raises(EngineUnavailable, match="the sum of the dots disagrees"):
        STEPS["by parts"](model, batch, meta_batch, engine="ghost")


@pytest.mark.parametrize("step", ["l2rw", "along", "weight net", "tangents"])
def test_a_forward_mode_that_is_wrong(step: str) -> None:
    model, batch, meta_batch = network(Wrong())
    before = Snapshot.of(model)
    with pytest.raises(EngineUnavailable, match="disagrees with a plain backward pass"):
        STEPS[step](model, batch, meta_batch, engine="jvp")
    before.assert_unchanged(model)


def test_an_implicit_virtual_step_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = meta_pass.move
    monkeypatch.setattr(implicit, "implicit_is_cheaper", lambda *sizes: True)
    monkeypatch.setattr(meta_pass, "move", lambda *given: replace(moved(*given), factor=0.5))
    model, batch, meta_batch = network(Scale())
    before = Snapshot.of(model)
    with pytest.raises(EngineUnavailable, match="a dot of an implicit virtual step disagrees"):
        STEPS["weight net"](model, batch, meta_batch, engine="ghost")
    before.assert_unchanged(model)


def test_pairs_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = stage_dots.pair_dots
    monkeypatch.setattr(stage_dots, "pairs_are_cheaper", lambda *_, directions=1: True)
    monkeypatch.setattr(stage_dots, "worth_tracing", lambda *_: True)
    monkeypatch.setattr(stage_dots, "pair_dots", lambda *given: 0.5 * pairs(*given))
    model, batch, meta_batch = network(Scale())
    with pytest.raises(EngineUnavailable, match="a dot by pairs disagrees"):
        metakern.l2rw_step(model, batch, meta_batch, engine="ghost")
    assert metakern.l2rw_step(model, batch, meta_batch).engine == "jvp"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("engine", ["ghost", "jvp"])
def test_rounding_is_no_disagreement(dtype: torch.dtype, engine: str) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU())]
    stem = nn.Unflatten(1, (1, 32)), nn.Conv1d(1, 1, 1), nn.Flatten()  # sums of a thousand terms that cancel
    model = nn.Sequential(*stem, *layers, nn.Linear(32, 3)).to(dtype)
    batch, meta_batch = inputs.pair(64, 8, 32, classes=3, dtype=dtype)
    assert metakern.l2rw_step(model, batch, meta_batch, engine=engine).engine == engine


@pytest.mark.parametrize("engine", ["ghost", "jvp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_batch_that_was_learnt_by_heart(engine: str, dtype: torch.dtype) -> None:
    """Its gradient is rounding alone, which is another in each pass."""
    model, (x, _), (x_meta, _) = network(nn.LayerNorm(5))
    with torch.no_grad():
        model[3].weight.mul_(200 if dtype == torch.float32 else 100)
    model = model.to(dtype)
    batches = [(z.to(dtype), model(z.to(dtype)).argmax(1)) for z in (x, x_meta)]
    assert metakern.l2rw_step(model, *batches, engine=engine).engine == engine


@pytest.mark.parametrize("engine", ["ghost", "jvp"])
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_once_for_each_structure(engine: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, meta_batch = network(Scale())
    passes = []
    backward = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: passes.append(0) or backward(*args, **kwargs))
    counts = []
    for rows in (slice(None), slice(None), slice(None)):
        passes.clear()
        metakern.l2rw_step(model, tuple(t[rows] for t in batch), meta_batch, engine=engine, memory=memory)
        counts.append(len(passes))
    assert counts[0] > counts[1] == counts[2]


class Adapter(nn.Module):
    """x + B s(A x) with B = 0 at first: nothing behind B has a gradient in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Sequential(nn.Linear(5, 5), Scale()), nn.Linear(5, 5, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x))


@WRONG
@pytest.mark.usefixtures("registered")
def test_a_rule_behind_a_gradient_that_is_zero_at_first() -> None:
    model, batch, meta_batch = network(Adapter())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        metakern.l2rw_step(model, batch, meta_batch, optimizer=optimizer, engine="ghost")
    with pytest.raises(EngineUnavailable, match="disagrees with a plain backward pass"):
        metakern.l2rw_step(model, batch, meta_batch, optimizer=optimizer, engine="ghost")


def test_gradients_that_stay_zero_are_not_checked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    checks, found = list[int](), agreement.weighted_backward
    monkeypatch.setattr(agreement, "weighted_backward", lambda *given, **kw: checks.append(1) or found(*given, **kw))
    model, batch, meta_batch = network(Adapter())
    for _ in range(80):
        metakern.l2rw_step(model, batch, meta_batch)
    assert len(checks) == 4


@pytest.mark.parametrize("registered", ["dots"], indirect=True)
@pytest.mark.usefixtures("registered")
def test_a_pass_that_overflows_does_not_count_as_checked() -> None:
    """As the first steps under a GradScaler."""
    model, batch, meta_batch = network(Scale())

    def losses(scale: float) -> Any:
        return lambda model, batch: scale * F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(ValueError, match="finite"):
        metakern.l2rw_step(model, batch, meta_batch, loss_fn=losses(1e200), engine="ghost")
    with pytest.raises(EngineUnavailable, match="disagrees with a plain backward pass"):
        metakern.l2rw_step(model, batch, meta_batch, loss_fn=losses(1.0), engine="ghost")


@pytest.mark.parametrize("registered", ["dots"], indirect=True)
@pytest.mark.usefixtures("registered")
def test_checked_for_the_parameters_that_count() -> None:
    model, batch, meta_batch = network(Scale())
    metakern.l2rw_step(model, batch, meta_batch, engine="ghost", params="0")
    with pytest.raises(EngineUnavailable, match="disagrees with a plain backward pass"):
        metakern.l2rw_step(model, batch, meta_batch, engine="ghost", params="2")


@pytest.mark.parametrize("registered", ["dots"], indirect=True)
@pytest.mark.usefixtures("registered")
def test_a_rule_that_is_mended_is_checked_anew() -> None:
    model, batch, meta_batch = network(Scale())
    with pytest.raises(EngineUnavailable, match="disagrees with a plain backward pass"):
        metakern.l2rw_step(model, batch, meta_batch, engine="ghost")
    metakern.register_layer(Scale, generic.RULE)
    metakern.l2rw_step(model, batch, meta_batch, engine="ghost")
    metakern.register_layer(Scale, metakern.LayerRule(lambda call: True, half(generic.dots), generic.weighted_grads))
    with pytest.raises(EngineUnavailable, match="disagrees with a plain backward pass"):
        metakern.l2rw_step(model, batch, meta_batch, engine="ghost")


def test_what_partial_is_given_tells_losses_apart() -> None:
    """Forward mode knows passes by their loss function only."""

    def losses(model: nn.Module, batch: Any, *, wrong: bool) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(Tripled.apply(logits) if wrong else logits, batch[1], reduction="none")

    model, batch, meta_batch = network(Scale())
    metakern.l2rw_step(model, batch, meta_batch, loss_fn=partial(losses, wrong=False), engine="jvp")
    with pytest.raises(EngineUnavailable, match="disagrees with a plain backward pass"):
        metakern.l2rw_step(model, batch, meta_batch, loss_fn=partial(losses, wrong=True), engine="jvp")


def by_decorator(wrong: bool) -> Callable[..., Tensor]:
    def decorated(logits_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda model, batch: F.cross_entropy(logits_of(model(batch[0])), batch[1], reduction="none")

    return decorated(Tripled.apply if wrong else torch.clone)


def by_closure(wrong: bool) -> Callable[..., Tensor]:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(Tripled.apply(logits) if wrong else logits, batch[1], reduction="none")

    return losses


def by_function(wrong: bool) -> Callable[..., Tensor]:
    given = torch.neg if wrong else torch.clone

    def losses(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(Tripled.apply(logits) if given is torch.neg else logits, batch[1], reduction="none")

    return losses


def by_default(wrong: bool) -> Callable[..., Tensor]:
    def losses(model: nn.Module, batch: Any, wrong: bool = wrong) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(Tripled.apply(logits) if wrong else logits, batch[1], reduction="none")

    return losses


def by_partial(wrong: bool) -> Callable[..., Tensor]:
    def losses(kind: str, model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(Tripled.apply(logits) if kind == "wrong" else logits, batch[1], reduction="none")

    return partial(losses, "wrong" if wrong else "right")


@pytest.mark.parametrize("made", [by_closure, by_decorator, by_function, by_default, by_partial])
def test_what_a_loss_is_made_with_tells_it_apart(made: Callable[[bool], Callable[..., Tensor]]) -> None:
    """Forward mode knows passes by their loss function only."""
    model, batch, meta_batch = network(Scale())
    metakern.l2rw_step(model, batch, meta_batch, loss_fn=made(False), engine="jvp")
    with pytest.raises(EngineUnavailable, match="disagrees with a plain backward pass"):
        metakern.l2rw_step(model, batch, meta_batch, loss_fn=made(True), engine="jvp")


def test_memory_that_runs_out_in_a_proof_is_no_verdict() -> None:
    calls = itertools.count(1)  # an iterator, which is not put back after passes that do not count

    def losses(model: nn.Module, batch: Any) -> Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model, batch, meta_batch = network(Scale())
    with pytest.raises(torch.OutOfMemoryError):
        metakern.l2rw_step(model, batch, meta_batch, loss_fn=losses)
    assert metakern.l2rw_step(model, batch, meta_batch, loss_fn=losses).engine == "ghost"
