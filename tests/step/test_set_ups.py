"""How people train: half precision with and without a scaler, accumulation, checkpointing, adapters."""

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.catalogue.structures import Checkpointed
from metakern.testing.judge import Snapshot, gradients
from metakern.testing.oracle import Oracle, clip_normalise

MEMORIES = pytest.mark.parametrize("memory", ["reuse", "two_pass"])


def setup_of(n: int = 6, m: int = 3, dtype: torch.dtype = torch.float32) -> Setup:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return Setup(model.to(dtype), *inputs.pair(n, m, 4, classes=3, dtype=dtype))


def scaled_by(scale: float) -> Callable[..., Tensor]:
    return lambda model, batch: scale * F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def half(dtype: torch.dtype = torch.float16) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype)


@MEMORIES
def test_scaled_float16_gives_the_weights_of_float32(memory: str) -> None:
    """Whatever the scale; dots carry its square, the gradient the scale itself, which the scaler divides out."""
    setup = setup_of()
    truth = setup.oracle()
    with half():
        plain = setup.oracle(dtype=torch.float32)
        for scale in (1.0, 2.0**8, 2.0**14):
            result = metakern.l2rw_step(
                setup.model, setup.batch, setup.meta_batch, loss_fn=scaled_by(scale), memory=memory
            )
            unscaled = {name: None if grad is None else grad / scale for name, grad in gradients(setup.model).items()}
            _within_half(result.dots / scale**2, truth.dots, plain.dots, truth.example_norms * truth.meta_norm)
            want, rounded = truth.gradient(result.weights), plain.gradient(result.weights)
            for name, grad in unscaled.items():
                assert grad is not None
                _within_half(grad, want[name], rounded[name], truth.gradient_scale(result.weights))


def _within_half(got: Tensor, want: Tensor, plain: Tensor, scale: Tensor) -> None:
    """Twice what the plain loop under autocast loses, and 8 eps of float16 (docs/numerics.md)."""
    lost = float(((plain.double() - want).abs() / scale).max())
    allowed = (2 * lost + budget.CONFIDENCE * torch.finfo(torch.float16).eps) * scale
    found = budget.verdict("half precision", got, want, allowed)
    assert found.ok, str(found)


@MEMORIES
@pytest.mark.parametrize("inside", [False, True], ids=["autocast around the step", "autocast inside the loss"])
def test_a_step_that_overflows_is_skipped_by_the_scaler(memory: str, inside: bool) -> None:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        with half() if inside else nullcontext():
            return scaler.scale(scaled_by(1.0)(model, batch))

    setup = setup_of()
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = copy.deepcopy(setup.model.state_dict())
    skipped = 0
    for _ in range(40):
        with nullcontext() if inside else half():
            metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, loss_fn=losses, memory=memory)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            break
        skipped += 1
        for name, value in setup.model.state_dict().items():
            assert torch.equal(value, before[name]), "a skipped step changed the model"
    assert skipped > 0
    assert any(not torch.equal(value, before[name]) for name, value in setup.model.state_dict().items())


@pytest.mark.parametrize("engine", ["auto", "ghost", "jvp", "double_backward"])
def test_selective_checkpointing_is_rejected(engine: str) -> None:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op is torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def losses(model: nn.Module, batch: Any) -> Tensor:
        context = functools.partial(create_selective_checkpoint_contexts, policy)
        return F.cross_entropy(
            checkpoint(model, batch[0], use_reentrant=False, context_fn=context),  # pyright: ignore
            batch[1],
            reduction="none",
        )

    setup = setup_of()
    before = Snapshot.of(setup.model)
    with pytest.raises(NotImplementedError, match="selective activation checkpointing allows one backward pass"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, loss_fn=losses, engine=engine)
    before.assert_unchanged(setup.model)


@pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
def test_weights_that_parametrize_keeps(engine: str) -> None:
    """Both passes would share their graph, and the next step the weights of the last one."""
    cached, plain = (setup_of(dtype=torch.float64) for _ in range(2))
    for setup in (cached, plain):
        for place in (0, 3):
            parametrize.register_parametrization(setup.model[place], "weight", Doubled())
        optimizer = torch.optim.SGD(setup.model.parameters(), lr=1.0)
        with parametrize.cached() if setup is cached else nullcontext():
            for _ in range(2):
                metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, optimizer=optimizer, engine=engine)
    for p, q in zip(cached.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not parametrize._cache_enabled


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.tanh(2 * weight)


def test_several_steps_in_one_autocast_block() -> None:
    """Each is one of the present weights, and so is what is evaluated in between, although autocast keeps what it has
    cast of a weight until the block ends.
    """
    setup, other = setup_of(), setup_of()
    optimizer, others = (torch.optim.SGD(each.model.parameters(), lr=1.0) for each in (setup, other))
    with half(torch.bfloat16):
        for _ in range(3):
            metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, optimizer=optimizer)
            logits = setup.model(setup.batch[0])
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                metakern.l2rw_step(other.model, other.batch, other.meta_batch, optimizer=others)
                assert torch.equal(logits, other.model(other.batch[0]))
    for p, q in zip(setup.model.parameters(), other.model.parameters()):
        assert torch.equal(p, q)


STEPS = 200


class Setting:
    """One way to train: the dtype of the model, what surrounds the step, and the scale of the losses."""

    def __init__(self, dtype: torch.dtype, autocast: torch.dtype | None = None, scale: float = 1.0) -> None:
        self.dtype, self.scale, self._autocast = dtype, scale, autocast

    def around(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else half(self._autocast)


SETTINGS = {
    "float64": Setting(torch.float64),
    "float32": Setting(torch.float32),
    "bfloat16-autocast": Setting(torch.float32, torch.bfloat16),
    "float16-autocast-scaled": Setting(torch.float32, torch.float16, 2.0**10),
    "bfloat16": Setting(torch.bfloat16),
}


def trained(setting: Setting, step: Callable[[Setup, Setting], None]) -> Tensor:
    """The parameters after the steps, each on its own batch."""
    setup = setup_of(dtype=setting.dtype)
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=0.02)
    for k in range(STEPS):
        setup.batch, setup.meta_batch = inputs.pair(4, 2, 4, classes=3, seed=k, dtype=setting.dtype)
        step(setup, setting)
        optimizer.step()
    return torch.cat([p.detach().double().flatten() for p in setup.model.parameters()])


def by_library(setup: Setup, setting: Setting) -> None:
    with setting.around():
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, loss_fn=scaled_by(setting.scale))
    for p in setup.model.parameters():
        assert p.grad is not None
        p.grad /= setting.scale


def by_loop(setup: Setup, setting: Setting) -> None:
    with setting.around():
        truth: Oracle = setup.oracle(dtype=setting.dtype)
        found = truth.gradient(truth.weights)
    for name, p in setup.model.named_parameters():
        p.grad = found[name].to(p.dtype)


@functools.cache
def trained_in_float64() -> Tensor:
    return trained(SETTINGS["float64"], by_loop)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_hundred_steps_follow_the_oracle(name: str) -> None:
    """The end of training, against the float64 loop: as far off as the plain loop in that precision, times two."""
    setting = SETTINGS[name]
    want, got = trained_in_float64(), trained(setting, by_library)
    lost = 0.0 if name == "float64" else float((trained(setting, by_loop) - want).norm() / want.norm())
    eps = budget.unit(setting.dtype, STEPS)
    found = budget.verdict("parameters", (got - want).norm(), torch.zeros(()), (2 * lost + 8 * eps) * want.norm())
    assert found.ok, str(found)


def split(batch: tuple[Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))


@MEMORIES
def test_accumulation_with_weights_per_micro_batch(memory: str) -> None:
    """Every micro-batch shares out a weight of one among its own examples."""
    setup = setup_of(7, dtype=torch.float64)
    truth = setup.oracle()
    sizes = [3, 4]
    weights = torch.cat([clip_normalise(dots) for dots in truth.dots.split(sizes)])
    for k, part in enumerate(split(setup.batch, sizes)):
        metakern.l2rw_step(setup.model, part, setup.meta_batch, accumulate=k > 0, memory=memory)
    budget.assert_gradient(gradients(setup.model), truth, weights=weights)


@MEMORIES
def test_accumulation_with_weights_over_all_of_it(memory: str) -> None:
    """The same as one step on everything: all dots first, then each part with its share of the weights."""
    setup = setup_of(7, dtype=torch.float64)
    truth = setup.oracle()
    parts = split(setup.batch, [3, 4])
    dots = torch.cat([metakern.grad_dots(setup.model, part, setup.meta_batch, memory=memory).dots for part in parts])
    weights = metakern.weights.clip_normalise(dots)
    for k, (part, some) in enumerate(zip(parts, weights.split([3, 4]), strict=True)):
        metakern.reweight_step(
            *(setup.model, part, setup.meta_batch),
            rule=lambda _, some=some: some,
            accumulate=k > 0,
            memory=memory,
        )
    budget.assert_dots(dots, truth)
    budget.assert_gradient(gradients(setup.model), truth, weights=weights)


class CheckpointedDropout(nn.Module):
    """A body with dropout, recomputed in the backward pass or not."""

    def __init__(self, recomputed: bool) -> None:
        super().__init__()
        self.recomputed, self.head = recomputed, nn.Linear(6, 3)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.body, x, use_reentrant=False) if self.recomputed else self.body(x)
        return self.head(torch.tanh(hidden))


@MEMORIES
def test_checkpointing_with_dropout_is_the_same_step(memory: str) -> None:
    answers = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = CheckpointedDropout(recomputed).double()
        batch, meta_batch = inputs.pair(6, 3, 4, classes=3)
        metakern.grad_dots(model, batch, meta_batch, memory=memory)  # the proof of independence draws nothing
        torch.manual_seed(1)
        result = metakern.l2rw_step(model, batch, meta_batch, memory=memory)
        answers.append((result, gradients(model)))
    (want, expected), (got, found) = answers
    assert got.engine == want.engine == "ghost"
    budget.assert_within(got.dots, want.dots, want.dots.abs().max())
    for name, grad in found.items():
        assert grad is not None
        budget.assert_within(grad, expected[name], 1.0, name=name)  # pyright: ignore


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("engine", ["auto", "ghost", "jvp", "double_backward"])
def test_reentrant_checkpointing_is_refused_with_the_way_out(engine: str) -> None:
    setup = setup_of()
    setup.model = Checkpointed(reentrant=True)
    before = Snapshot.of(setup.model)
    with pytest.raises((RuntimeError, NotImplementedError), match="use_reentrant=False"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine=engine)
    before.assert_unchanged(setup.model)


@pytest.mark.filterwarnings("ignore")
@MEMORIES
def test_peft_lora(memory: str) -> None:
    """Adapters of peft on a frozen base: dots and gradient of the adapters alone."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    setup = setup_of(dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["0", "3"], lora_dropout=0.0, init_lora_weights=False)
    setup.model = peft.get_peft_model(setup.model, config).double()
    setup.batch, setup.meta_batch = inputs.pair(6, 3, 4, classes=3)
    truth = setup.oracle()
    result = metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, memory=memory)
    assert result.engine == "ghost"
    budget.assert_dots(result.dots, truth)
    budget.assert_gradient(gradients(setup.model), truth, weights=result.weights)
    assert all("lora" in name for name in gradients(setup.model))
