"""Compiled steps: exact on every kind of layer, reading all values anew, refused where one would be frozen."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs, models
from metakern.testing.catalogue import CASES, Case
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, judge_step

NAMES = (
    "conv2d conv-transpose1d embedding layer-norm group-norm tied-weights weight-norm attention embedding-bag-mean "
    "prelu bare-matmul-einsum"
).split()
SOME = [case for case in CASES if case.name in NAMES]

# The program as it was traced, without what inductor makes of it: that takes a C++ compiler half a minute.
compile_step = partial(metakern.compile_step, backend="eager")


def batches(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    return inputs.pair(8, 3, 6, classes=3, seed=seed, dtype=dtype)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_is_exact_for_every_kind_of_layer(case: Case) -> None:
    setup = case.make(6, 3)
    before = Snapshot.of(setup.model)
    step = compile_step(setup.model, setup.batch, setup.meta_batch, loss_fn=setup.loss_fn)
    before.assert_unchanged(setup.model)
    judge_step(lambda model, *given, loss_fn: step(*given), setup)


def assert_as_uncompiled(step: Any, model: nn.Module, given: Any, **settings: Any) -> None:
    """To the last bits: the program holds the same operations."""
    got = step(*given)
    grads = {name: p.grad for name, p in model.named_parameters()}
    want = metakern.reweight_step(model, *given, **settings)
    for one, other in zip(got[:4], want[:4], strict=True):
        budget.assert_within(one, other, 1 + other.abs(), dtype=torch.float64)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert grads[name] is not None
        budget.assert_within(grads[name], p.grad, 1 + p.grad.abs(), dtype=torch.float64)


def test_reads_parameters_buffers_and_what_a_loss_holds_anew() -> None:
    model, scale = network(), torch.ones(3, dtype=torch.float64)
    model.register_buffer("shift", torch.zeros(3, dtype=torch.float64))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        logits = (model(batch[0]) + model.shift) * scale
        return nn.functional.cross_entropy(logits, batch[1], reduction="none")

    step = compile_step(model, *batches(), loss_fn=loss_fn)
    model.shift += torch.arange(3.0)
    scale.mul_(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    model[0].weight.data = model[0].weight.data * 1.5
    assert_as_uncompiled(step, model, batches(1), loss_fn=loss_fn)


def test_steps_with_the_optimizer_and_adds_to_gradients() -> None:
    trained, other = network(), network()
    optimizer, second = (torch.optim.Adam(m.parameters(), 0.01) for m in (trained, other))
    step = compile_step(trained, *batches(), optimizer=optimizer, rule="softmax")
    assert not optimizer.state
    for seed in range(4):
        step(*batches(seed))
        metakern.reweight_step(other, *batches(seed), optimizer=second, rule="softmax")
    for p, q in zip(trained.parameters(), other.parameters(), strict=True):
        budget.assert_within(p, q, 1 + q.abs(), dtype=torch.float64)
    first = metakern.l2rw_step(other, *batches(7)) and [p.grad.clone() for p in other.parameters()]
    compile_step(other, *batches())(*batches(7), accumulate=True)
    for p, grad in zip(other.parameters(), first, strict=True):
        budget.assert_within(p.grad, 2 * grad, 1 + grad.abs(), dtype=torch.float64)


@pytest.mark.parametrize("engine", ["ghost", "jvp"])
def test_lstm_in_single_precision(engine: str) -> None:
    """oneDNN's, which a step takes and a program cannot hold."""

    class Last(nn.LSTM):
        def forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(input)[0][:, -1]

    torch.manual_seed(0)
    model = nn.Sequential(Last(3, 4, batch_first=True), nn.Linear(4, 3))
    setup = Setup(model, *inputs.pair(6, 3, 5, 3, classes=3, dtype=torch.float32))
    step = compile_step(model, setup.batch, setup.meta_batch, engine=engine)
    judge_step(lambda model, *given, loss_fn: step(*given), setup, plain=setup.oracle(dtype=torch.float32))


class Branching(nn.Module):
    """Another function of its weights where the inputs are large."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if bool((x.abs() < 100).all()) else self.inner(x).sin()


def test_dropout_draws_the_masks_of_the_step_anew() -> None:
    model = nn.Sequential(network(), nn.Dropout(0.5), nn.Linear(3, 3).double())
    before = torch.get_rng_state()
    step = compile_step(model, *batches())
    assert torch.equal(torch.get_rng_state(), before)
    seen = []
    for seed in range(3):
        torch.manual_seed(seed)
        got = step(*batches())
        grads, left = [p.grad for p in model.parameters()], torch.get_rng_state()
        torch.manual_seed(seed)
        want = metakern.reweight_step(model, *batches())
        assert torch.equal(torch.get_rng_state(), left)
        for one, other in zip((*got[:3], *grads), (*want[:3], *(p.grad for p in model.parameters())), strict=True):
            assert one is not None
            assert other is not None
            budget.assert_within(one, other, 1 + other.abs(), dtype=torch.float64)
        seen.append(got.losses)
    assert not torch.equal(seen[0], seen[1])


def test_dropout_of_a_batch_that_is_taken_uncompiled_is_drawn_once() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses if bool(batch[0][0, 0] > 5) else 2 * losses

    model = nn.Sequential(network(), nn.Dropout(0.5))
    step = compile_step(model, *batches(), loss_fn=loss_fn)
    (x, y), meta_batch = batches()
    given = (torch.full_like(x, 6), y), meta_batch
    torch.manual_seed(1)
    got, left = step(*given), torch.get_rng_state()
    torch.manual_seed(1)
    want = metakern.reweight_step(model, *given, loss_fn=loss_fn)
    assert torch.equal(got.losses, want.losses)
    assert torch.equal(torch.get_rng_state(), left)


def test_dropout_of_a_step_whose_optimizer_fails_is_not_drawn() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            raise OSError("no step today")

    model = nn.Sequential(network(), nn.Dropout(0.5))
    optimizer = Failing(model.parameters(), lr=0.1)
    step = compile_step(model, *batches(), optimizer=optimizer)
    before = Snapshot.of(model, optimizer)
    with pytest.raises(OSError, match="no step today"):
        step(*batches(1))
    before.assert_unchanged(model, optimizer)


def test_a_batch_that_takes_another_branch_is_taken_uncompiled() -> None:
    model = Branching()
    step = compile_step(model, *batches())
    assert_as_uncompiled(step, model, batches(1))
    (x, y), meta = batches(2)
    x[0] *= 1000
    assert_as_uncompiled(step, model, ((x, y), meta))


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = network()
    step = compile_step(model, *batches())
    before, ((x, y), meta) = Snapshot.of(model), batches()
    x[2] = torch.nan
    with pytest.raises(ValueError, match=r"losses of examples \[2\] are not finite"):
        step((x, y), meta)
    before.assert_unchanged(model)


class Counting(nn.Module):
    def __init__(self, write: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.inner, self.calls, self.write = network(), 0, write
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        return self.inner(x)


def through(change: Callable[[Tensor], Any]) -> Callable[[nn.Module, Any], Tensor]:
    """Losses times a number that depends on a weight."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses * change(next(model.parameters()).detach())

    return loss_fn


@pytest.mark.parametrize(
    ("model", "loss_fn", "message"),
    [
        (Counting(lambda m: random.random()), None, "random numbers from Python or NumPy"),
        (Counting(lambda m: torch.manual_seed(0)), None, "in another state than the step: the pass seeds it"),
        (Counting(lambda m: setattr(m, "seen", m.seen + 1)), None, "replaces its buffers by other tensors"),
        (Counting(lambda m: setattr(m, "calls", m.calls + 1)), None, "writes attributes"),
        (network(), through(lambda weight: weight.sum().item()), "floating point number"),
        (network(), through(lambda weight: float(weight.numpy()[0, 0])), "Tensor.numpy"),
        (network(), through(lambda weight: sum(weight[0].tolist())), "Tensor.tolist"),
        (network(), through(lambda weight: weight[weight > 0].sum()), "size depends on values"),
        (nn.Sequential(network(), nn.BatchNorm1d(3, momentum=None).double()), None, "a number that it changes"),
    ],
)
def test_refuses_what_a_program_would_freeze(model: nn.Module, loss_fn: Any, message: str) -> None:
    before = Snapshot.of(model)
    with pytest.raises(NotImplementedError, match=message):
        compile_step(model, *batches(), loss_fn=loss_fn)
    before.assert_unchanged(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[3].requires_grad_(False),
        lambda model: model.eval(),
        lambda model: model.float(),
        lambda model: setattr(model[2], "eps", 0.1),
        lambda model: setattr(model[3], "weight", nn.Parameter(model[3].weight.detach().clone())),
        lambda model: model[0].register_forward_hook(lambda *_: None),
    ],
)
def test_a_model_that_is_another_by_now_is_refused(change: Callable[[Any], Any]) -> None:
    model = network()
    step = compile_step(model, *batches())
    change(model)
    with pytest.raises(ValueError, match="make another step"):
        step(*batches())
    assert all(p.grad is None for p in model.parameters())


class Settings:
    power, scales = 1.0, [1.0, 2.0]

    def scale(self) -> float:
        return self.scales[0]


class Trainer:
    """Its loss looks at some of what it holds."""

    def __init__(self) -> None:
        self.model, self.rows, self.settings, self.steps = Growing(network()), torch.ones(3).double(), Settings(), 0
        self.clip = [0.0]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch[0]) * self.rows, batch[1], reduction="none")
        return self.settings.scale() * losses**self.settings.power * GROWTH["factor"]

    def rule(self, dots: Tensor) -> Tensor:
        return dots.clamp(min=self.clip[0])


class Growing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.schedule, self.function = inner, {"steps": (1, [2.0])}, torch.tanh
        self.handle = inner.register_forward_hook(lambda module, given, output: 2 * output)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x) * self.schedule["steps"][1][0])

    def hook_anew(self) -> None:
        self.handle.remove()
        self.handle = self.inner.register_forward_hook(lambda module, given, output: 3 * output)


GROWTH = {"factor": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        lambda trainer: setattr(trainer.settings, "power", 2.0),
        lambda trainer: setattr(trainer.settings, "scales", [3.0]),
        lambda trainer: setattr(trainer, "rows", 2 * trainer.rows),
        lambda trainer: trainer.clip.__setitem__(0, -1.0),
        lambda trainer: GROWTH.update(factor=GROWTH["factor"] + 1),
        lambda trainer: trainer.model.schedule["steps"][1].append(3.0),
        lambda trainer: setattr(trainer.model, "function", torch.sin),
        lambda trainer: trainer.model.hook_anew(),
    ],
)
def test_numbers_and_functions_that_are_others_by_now_are_refused(change: Callable[[Any], Any]) -> None:
    trainer = Trainer()
    step = compile_step(trainer.model, *batches(), loss_fn=trainer.loss, rule=trainer.rule)
    trainer.steps += 1  # nothing that its loss looks at
    trainer.rows.mul_(2)
    assert_as_uncompiled(step, trainer.model, batches(1), loss_fn=trainer.loss, rule=trainer.rule)
    change(trainer)
    with pytest.raises(ValueError, match="make another step"):
        step(*batches(2))


scale = torch.ones(3)
"""Named like an attribute of the model below, and nothing that it looks at."""


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = network(), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def test_a_global_named_like_an_attribute_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scaled()
    step = compile_step(model, *batches())
    monkeypatch.setitem(globals(), "scale", torch.zeros(3))
    assert_as_uncompiled(step, model, batches(1))


def test_a_loss_that_counts_its_calls_is_refused_and_put_back() -> None:
    calls = [0]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") * calls[0]

    with pytest.raises(NotImplementedError, match="counts or keeps something else"):
        compile_step(network(), *batches(), loss_fn=loss_fn)
    assert calls == [0]


def test_other_shapes_are_taken_uncompiled_and_the_program_after_them() -> None:
    """As the last batch of an epoch."""
    model, (batch, meta) = network(), batches()
    step, uncompiled = compile_step(model, batch, meta), copy.deepcopy(model)
    short = batch[0][:3], batch[1][:3]
    for some in (short, batch):
        found = step(some, meta)
        expected = metakern.l2rw_step(uncompiled, some, meta)
        budget.assert_within(found.dots, expected.dots, 1 + expected.dots.abs(), dtype=torch.float64)
        for p, q in zip(model.parameters(), uncompiled.parameters(), strict=True):
            budget.assert_within(p.grad, q.grad, 1 + q.grad.abs(), dtype=torch.float64)


def test_other_dtypes_and_forms_are_refused_before_anything_changes() -> None:
    step = compile_step(network(), *batches())
    batch, meta = batches()
    with pytest.raises(ValueError, match=r"shape \(8, 6\) at position 0, got torch.float16"):
        step((batch[0].half(), batch[1]), meta)
    with pytest.raises(ValueError, match=r"captured ones, \[\(\*, \*\), \(\*, \*\)\]; got \[\[\*, \*\], \(\*, \*\)\]"):
        step([*batch], meta)


def test_what_has_changed_is_named() -> None:
    model = network()
    step = compile_step(model, *batches())
    model.eval()
    with pytest.raises(ValueError, match="training: True then, False now"):
        step(*batches())


def test_new_batches_with_a_graph_leave_none_behind() -> None:
    step = compile_step(network(), *batches())
    batch, meta = batches()
    for _ in range(2):
        step((batch[0].clone().requires_grad_() * 2, batch[1]), meta)
    assert not any(t.requires_grad for t in step._program._batches.tensors)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
def test_inductor_is_exact() -> None:
    torch.manual_seed(0)
    model = models.mlp(16, 1).double()
    step = metakern.compile_step(model, *inputs.pair(8, 3, 16, classes=10))
    given = inputs.pair(8, 3, 16, classes=10, seed=1)
    judge_step(lambda model, *given, loss_fn: step(*given), Setup(model, *given))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_takes_one_mask_for_losses_and_gradient() -> None:
    """The mask, read off the gradient of one example, gives the loss that was returned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    given = inputs.pair(1, 3, 6, classes=3)
    step = metakern.compile_step(model, *given, rule=torch.ones_like)
    masks = set()
    for _ in range(8):
        losses = step(*given).losses
        last, shift = model[2].weight.grad, model[2].bias.grad
        dropped = shift @ last / shift.square().sum()  # last = shift dropped^T
        kept = dropped.abs() > 1e-9
        loss = nn.functional.cross_entropy(model[2](dropped).unsqueeze(0), given[0][1], reduction="none")
        budget.assert_within(dropped, 2 * kept * model[0](given[0][0])[0], dropped.abs() + 1, dtype=torch.float64)
        budget.assert_within(losses, loss, loss + 1, dtype=torch.float64)
        masks.add(tuple(kept.tolist()))
    assert len(masks) > 1


@pytest.mark.parametrize("draws", [False, True])
def test_a_compiler_that_is_wrong_is_refused(draws: bool) -> None:
    """But where the step draws numbers: compilers draw them in an order of their own."""

    def wrong(graph: Any, given: Any) -> Any:
        return lambda *tensors: [t * 1.05 if t.is_floating_point() else t for t in graph(*tensors)]

    model = nn.Sequential(network(), nn.Dropout(0.5) if draws else nn.Identity())
    before = Snapshot.of(model)
    if draws:
        metakern.compile_step(model, *batches(), backend=wrong)
        return
    with pytest.raises(NotImplementedError, match="the compiler is wrong about an operation"):
        metakern.compile_step(model, *batches(), backend=wrong)
    before.assert_unchanged(model)
