"""A whole re-weighted step as one CUDA graph: one launch instead of hundreds, for models with short kernels.

    step = capture_step(model, batch, meta_batch, optimizer=optimizer)
    for batch, meta_batch in loader:
        result = step(batch, meta_batch)

The graph contains everything: both forward and backward passes, dots, weights, weighted gradient, and the optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.host import without_waiting
from metakern.capture.losses import LossFunction
from metakern.capture.members import parameters_of
from metakern.capture.parameters import trainable_parameters
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.buffers import unchanged_buffers
from metakern.capture.state.function_state import FunctionState
from metakern.capture.state.gradients import gradients_as_before
from metakern.capture.state.random_state import random_state, restore_random_state
from metakern.step.hand_over import stale
from metakern.step.programs.assumptions import Assumptions
from metakern.step.programs.captured_optimizer import optimizer_as_before
from metakern.step.programs.compilable import PartResult, observe
from metakern.step.programs.own_batches import OwnBatches
from metakern.step.result import StepResult
from metakern.step.reweight import reweight_step

WARM_UP = 3
"""Steps before the rehearsal: they prove independence, compile kernels, and let libraries choose theirs. The first is
looked at: what it counts or draws on the host, a replay would not.
"""


class CapturedStep:
    """The step that `capture_step` captured; call it with batches of the shapes and dtypes it was captured with."""

    def __init__(
        self,
        replay: Callable[[], None],
        batches: OwnBatches,
        gradient: Mapping[nn.Parameter, Tensor | None],
        result: StepResult,
        assumptions: Callable[[], Assumptions],
        stale: Callable[[], list[Tensor]],
    ) -> None:
        self._replay, self._batches, self._gradient, self._result = replay, batches, dict(gradient), result
        self._assumptions, self._known, self._stale = assumptions, assumptions(), stale

    def __call__(self, batch: Any, meta_batch: Any) -> StepResult:
        """One step on new batches; `.grad` holds the weighted gradient until the next step.

        Args:
            batch, meta_batch: n and m examples on the same device, in the form of the captured ones.

        Returns: `StepResult(weights [n], dots [n], losses [n], meta_loss [], engine)`, in tensors of their own.

        Raises: ValueError if a batch differs from the captured one in more than tensor values, or if anything that
            model, loss function, rule or optimizer read has changed in more than tensor values.
        """
        self._known.require(self._assumptions())
        self._batches.take(batch, meta_batch)
        self._replay()
        for parameter in self._stale():
            parameter.grad = None
        for parameter, grad in self._gradient.items():  # zero_grad may have removed it, or a backward pass left another
            parameter.grad = grad
        weights, dots, losses, meta_loss, engine = self._result
        return StepResult(weights.clone(), dots.clone(), losses.clone(), meta_loss.clone(), engine)


def capture_step(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    rule: str | Callable[[Tensor], Tensor] = "clip_normalise",
    loss_fn: LossFunction | None = None,
    engine: str = "auto",
    params: Any = None,
    memory: str = "reuse",
    allow_unused: bool = False,
) -> CapturedStep:
    """Capture `reweight_step` into a CUDA graph; parameters, optimizer, buffers and random state are left unchanged.

    weights = rule(dots);  .grad = sum_n weights_n dl_n/dtheta;  optimizer.step()

    A captured step does not check losses and dots for NaN, because the host would have to wait for them. Learning rates
    that change must be tensors on the device (`lr=torch.tensor(0.1, device="cuda")`, `capturable=True`). For mixed
    precision, capture inside `torch.autocast(..., cache_enabled=False)`.

    Args:
        batch, meta_batch: tuples, lists or dicts of CUDA tensors; the captured step takes others of the same shapes.
        optimizer: must have taken a step before, so that its state exists.
        Others: as for `reweight_step`.
    Returns: `CapturedStep`, called as `step(batch, meta_batch) -> StepResult`.
    Raises:
        ValueError: model and batches are not on one CUDA device, the optimizer has no state yet, or it counts its steps
            on the host.
        NotImplementedError: the step uses forward mode and draws random numbers; it draws from Python's or NumPy's
            generators, counts or keeps something from step to step, or replaces buffers by other tensors.
        RuntimeError: the step cannot be captured, for example because the model makes the host wait; the message says
            why.
        Otherwise as `reweight_step`.
    """
    trainable = trainable_parameters(model)
    batches = OwnBatches(batch=batch, meta_batch=meta_batch)
    device = _device_of(trainable, batches.leaves)

    def step(optimizer: torch.optim.Optimizer | None = None) -> StepResult:
        return reweight_step(
            model,
            *batches.built(),
            rule=rule,
            loss_fn=loss_fn,
            engine=engine,
            params=params,
            memory=memory,
            allow_unused=allow_unused,
            optimizer=optimizer,
        )

    assumptions = partial(assumptions_of, model, loss_fn, rule, optimizer)
    held = () if optimizer is None else (p for group in optimizer.param_groups for p in group["params"])
    with torch.cuda.device(device), gradients_as_before([*parameters_of(model), *held]):
        _warm_up(model, [loss_fn, rule], assumptions, step)
        with optimizer_as_before(optimizer):
            graph, result = _captured(lambda: step(optimizer))
        gradient = {p: p.grad for p in trainable.values()}
    return CapturedStep(
        graph.replay, batches, gradient, result, assumptions, partial(stale, model, trainable, optimizer)
    )


def assumptions_of(model: nn.Module, loss_fn: Any, rule: Any, optimizer: torch.optim.Optimizer | None) -> Assumptions:
    """The assumptions of a graph. If momentum tensors were replaced, the graph would go on writing into the memory of
    the old ones, which other tensors may use by then.
    """
    stepped = () if optimizer is None else (*optimizer.param_groups, optimizer.state)
    return Assumptions(model, loss_fn, rule, *stepped, places=True)


def _warm_up(
    model: nn.Module, functions: Sequence[Any], assumptions: Callable[[], Assumptions], step: Callable[[], StepResult]
) -> None:
    """A few steps on a separate stream, as capture requires; their effects are undone.

    Raises: EngineUnavailable: a step changes what a replay would not.
    """

    def observed() -> PartResult:
        *values, engine = step()
        return PartResult(engine, values, {p: p.grad for p in parameters_of(model) if p.grad is not None})

    before, stream = random_state(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            draws = observe(model, functions, assumptions, observed).draws
            kept = FunctionState(model, *functions)
            try:
                with unchanged_buffers(model):
                    for _ in range(WARM_UP - 1):
                        step()
                    with _waits_refused():
                        engine = rehearse(step)
            finally:
                kept.restore()
        _require_no_repeated_draws(engine, draws)
    finally:
        torch.cuda.current_stream().wait_stream(stream)
        restore_random_state(before)


def rehearse(step: Callable[[], StepResult]) -> str:
    """Run a step as it will run in the capture, so that no kernel runs there for the first time, and anything that
    cannot be captured fails here, without harm. Returns the name of the engine.

    Raises: RuntimeError: the step cannot be captured.
    """
    try:
        with without_waiting():
            return step().engine
    except RuntimeError as error:
        raise RuntimeError(f"the step cannot be captured into a CUDA graph: {error}") from error


@contextmanager
def _waits_refused() -> Iterator[None]:
    """Inside the block, torch raises if the host would wait for a value: during a capture, that would leave torch's
    allocator and generator broken.
    """
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that it does not find every wait
        torch.cuda.set_sync_debug_mode(mode)


def _captured(step: Callable[[], StepResult]) -> tuple[torch.cuda.CUDAGraph, StepResult]:
    """The graph of a step, and where its results will be."""
    # torch's own stream for captures belongs to the device of the first one
    graph, stream, cause = torch.cuda.CUDAGraph(), torch.cuda.Stream(), None
    try:
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            try:
                return graph, step()
            except RuntimeError as error:  # ending the failed capture raises another error, without the cause
                cause = error
                raise
    except RuntimeError as error:
        raise RuntimeError(f"the step cannot be captured into a CUDA graph: {cause or error}") from error


def _require_no_repeated_draws(engine: str, draws: bool) -> None:
    """Forward mode repeats the pass with the random numbers of the first one; a graph cannot rewind a generator."""
    if engine == "jvp" and draws:
        raise EngineUnavailable(
            "the step uses forward mode and draws random numbers (dropout), which its two passes must share but "
            "a CUDA graph draws twice; use compile_step, whose second pass reuses the numbers of the first"
        )


def _device_of(trainable: Mapping[str, nn.Parameter], leaves: list[Any]) -> torch.device:
    """The one CUDA device of a model and its batches.

    Raises: ValueError
    """
    device = next(iter(trainable.values())).device
    for name, p in trainable.items():
        if not p.is_cuda:
            raise ValueError(
                f"model: parameter '{name}' is on {p.device}; a CUDA graph needs the model on a CUDA device"
            )
        if p.device != device:
            raise ValueError(
                f"model: parameter '{name}' is on {p.device}, others on {device}; a CUDA graph needs them on one device"
            )
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.device != device:
            raise ValueError(f"batch and meta_batch: tensor {place} is on {leaf.device}; put it on the model's device")
    return device
