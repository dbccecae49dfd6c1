"""A whole re-weighted step as one compiled program: what torch.compile does to a plain step, done to this one.

    step = compile_step(model, batch, meta_batch, optimizer=optimizer)
    for batch, meta_batch in loader:
        result = step(batch, meta_batch)

The step is traced down to torch's own operators (both passes, dots, weights, weighted gradient) and given to inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.losses import LossFunction
from metakern.capture.parameters import trainable_parameters
from metakern.capture.random_state import restore_random_state, torch_random_state
from metakern.capture.state import unchanged_on_error
from metakern.step.captured import gradients_as_before
from metakern.step.compilable import gradients_of, require_same, see, split
from metakern.step.granted import Granted
from metakern.step.hand_over import hand_over, require_optimizer
from metakern.step.own_batches import OwnBatches
from metakern.step.own_buffers import OwnBuffers
from metakern.step.program import Backend, Program, traced
from metakern.step.result import StepResult
from metakern.step.reweight import reweight_step


class CompiledStep:
    """The step that `compile_step` compiled; call it with batches of the shapes and dtypes it was compiled with."""

    def __init__(
        self,
        program: Program,
        batches: OwnBatches,
        buffers: OwnBuffers,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        uncompiled: Callable[[bool], StepResult],
        granted: Callable[[], Granted],
        engine: str,
        draws: bool,
    ) -> None:
        self._program, self._batches, self._buffers = program, batches, buffers
        self._trainable, self._optimizer, self._uncompiled = trainable_parameters(model), optimizer, uncompiled
        self._granted, self._known = granted, granted()
        self._engine, self._draws = engine, draws

    def __call__(self, batch: Any, meta_batch: Any, *, accumulate: bool = False) -> StepResult:
        """One step on new batches, as `reweight_step` takes it.

        Where this batch takes another branch of the model's code than the compiled one (a loss that is not finite among
        them), the step is taken uncompiled.

        Raises: ValueError when a batch differs from the compiled one by more than the values of its tensors, or what
            model, loss function and rule look at has changed by more than the values of tensors; else as
            `reweight_step`.
        """
        self._known.require(self._granted())
        self._batches.take(batch, meta_batch)
        start = torch_random_state() if self._draws else None
        found = self._program([*self._batches.tensors, *self._buffers.tensors])
        if found is None:
            if start is not None:
                restore_random_state(start)
            return self._uncompiled(accumulate)
        step = split(found, len(self._buffers.tensors))
        gradient = dict(zip(self._trainable, step.gradient, strict=True))
        hand_over(self._trainable, gradient, self._optimizer, accumulate)
        self._buffers.take(step.buffers)
        weights, dots, losses, meta_loss = step.result
        return StepResult(weights, dots, losses, meta_loss, self._engine)


def compile_step(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    rule: str | Callable[[Tensor], Tensor] = "clip_normalise",
    loss_fn: LossFunction | None = None,
    engine: str = "auto",
    params: Any = None,
    dot_precision: str = "same",
    backend: str | Backend = "inductor",
) -> CompiledStep:
    """Compile `reweight_step` into one program; parameters, gradients, buffers and random state stay as they are.

    weights = rule(dots);  .grad = sum_n weights_n dl_n/dtheta

    Shapes are those of the batches given here, autocast is as around this call, and the optimizer steps uncompiled.
    Rounding differs from the uncompiled step, as it does between a compiled plain step and an uncompiled one. Numbers,
    flags, functions and tensors that model, loss and rule look at are those of this call: the compiled step refuses to
    run once one is another. What the pass writes into buffers (running statistics) counts once in every step. Dropout
    draws new masks in every step, from torch's generator but with inductor in an order of its own. Takes some tens of
    seconds, for deep networks minutes.

    Args:
        batch, meta_batch: tuples, lists or dicts of tensors; the compiled step takes others of the same shapes.
        backend: as for `torch.compile`.
        The others: as for `reweight_step`.
    Returns: `CompiledStep`, called as `step(batch, meta_batch) -> StepResult`.
    Raises:
        NotImplementedError: the pass draws random numbers from Python or NumPy, or seeds torch's generator; writes
            attributes, or puts other tensors in place of buffers; reads numbers from tensors, or takes rows by value.
            `reweight_step` serves all of these.
        The others: as `reweight_step`.
    """
    trainable = trainable_parameters(model)
    require_optimizer(optimizer, trainable)
    compiler = torch._dynamo.lookup_backend(backend)
    batches = OwnBatches(batch, meta_batch)

    def take(given: tuple[Any, Any], engine: str = engine, **settings: Any) -> StepResult:
        return reweight_step(
            model,
            *given,
            rule=rule,
            loss_fn=loss_fn,
            engine=engine,
            params=params,
            dot_precision=dot_precision,
            **settings,
        )

    def granted() -> Granted:
        return Granted(model, loss_fn, rule)

    with gradients_as_before(trainable):
        seen = see(model, loss_fn, granted, lambda: take(batches.built()))
        buffers = OwnBuffers(model, seen.buffers)

        def step(*tensors: Tensor) -> list[Tensor]:
            with buffers.copied(tensors[len(batches.tensors) :]) as written:
                result = take(batches.built(list(tensors)), seen.engine)
            return [*result[:4], *written, *gradients_of(model)]

        with unchanged_on_error(model), _random_state_as_before():
            program = traced(step, [*batches.tensors, *buffers.tensors])
            require_same(program, seen, batches.tensors)
            program.compile(compiler)

    def uncompiled(accumulate: bool) -> StepResult:
        return take(batches.built(), optimizer=optimizer, accumulate=accumulate)

    return CompiledStep(program, batches, buffers, model, optimizer, uncompiled, granted, seen.engine, seen.draws)


@contextmanager
def _random_state_as_before() -> Iterator[None]:
    """Torch's default generators are afterwards as they were."""
    start = torch_random_state()
    try:
        yield
    finally:
        restore_random_state(start)
