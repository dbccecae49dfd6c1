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
from metakern.capture.random_state import (
    random_state,
    restore_random_state,
    same_elsewhere,
    same_torch_state,
    torch_random_state,
)
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state import unchanged_buffers, unchanged_on_error
from metakern.capture.surroundings import Surroundings
from metakern.step.captured import gradients_as_before
from metakern.step.granted import Granted
from metakern.step.hand_over import hand_over, require_optimizer
from metakern.step.own_batches import OwnBatches
from metakern.step.program import Backend, Program, traced
from metakern.step.result import StepResult
from metakern.step.reweight import reweight_step


class CompiledStep:
    """The step that `compile_step` compiled; call it with batches of the shapes and dtypes it was compiled with."""

    def __init__(
        self,
        program: Program,
        batches: OwnBatches,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        uncompiled: Callable[[bool], StepResult],
        granted: Callable[[], Granted],
        draws: bool,
    ) -> None:
        self._program, self._batches, self._model, self._optimizer = program, batches, model, optimizer
        self._uncompiled, self._trainable = uncompiled, trainable_parameters(model)
        self._granted, self._known = granted, granted()
        self._draws = draws

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
        found = self._program(self._batches.tensors)
        if found is None:
            if start is not None:
                restore_random_state(start)
            return self._uncompiled(accumulate)
        weights, dots, losses, meta_loss, *grads = found
        hand_over(self._trainable, dict(zip(self._trainable, grads, strict=True)), self._optimizer, accumulate)
        return StepResult(weights, dots, losses, meta_loss, "ghost")


def compile_step(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    rule: str | Callable[[Tensor], Tensor] = "clip_normalise",
    loss_fn: LossFunction | None = None,
    params: Any = None,
    dot_precision: str = "same",
    backend: str | Backend = "inductor",
) -> CompiledStep:
    """Compile `reweight_step` into one program; parameters, gradients, buffers and random state stay as they are.

    weights = rule(dots);  .grad = sum_n weights_n dl_n/dtheta

    Shapes are those of the batches given here, autocast is as around this call, and the
    optimizer steps uncompiled. Rounding differs from the uncompiled step, as it does between a compiled plain step and
    an uncompiled one. Numbers, flags, functions and tensors that model, loss and rule look at are those of this call:
    the compiled step refuses to run once one is another. Dropout draws new masks in every step, from torch's generator
    but with inductor in an order of its own. Takes some tens of seconds.

    Args:
        batch, meta_batch: tuples, lists or dicts of tensors; the compiled step takes others of the same shapes.
        backend: as for `torch.compile`.
        The others: as for `reweight_step`.
    Returns: `CompiledStep`, called as `step(batch, meta_batch) -> StepResult`.
    Raises:
        NotImplementedError: the pass draws random numbers from Python or NumPy, or sets torch's generator; writes
            buffers or attributes; reads numbers from tensors, or takes rows by value; or ghost is not exact for the
            model. `reweight_step` serves all of these.
        The others: as `reweight_step`.
    """
    trainable = trainable_parameters(model)
    require_optimizer(optimizer, trainable)
    compiler = torch._dynamo.lookup_backend(backend)
    batches = OwnBatches(batch, meta_batch)
    settings = dict(rule=rule, loss_fn=loss_fn, engine="ghost", params=params, dot_precision=dot_precision)

    def uncompiled(accumulate: bool) -> StepResult:
        return reweight_step(model, *batches.built(), optimizer=optimizer, accumulate=accumulate, **settings)

    def step(*tensors: Tensor) -> list[Tensor]:
        weights, dots, losses, meta_loss, _ = reweight_step(model, *batches.built(list(tensors)), **settings)
        return [weights, dots, losses, meta_loss, *(p.grad for p in trainable.values() if p.grad is not None)]

    def granted() -> Granted:
        return Granted(model, loss_fn, rule)

    with gradients_as_before(trainable):
        draws = _require_no_trace_left(model, loss_fn, granted, lambda: step(*batches.tensors))
        with unchanged_on_error(model), _random_state_as_before():
            program = traced(step, batches.tensors)
            if draws:
                _require_same_draws(lambda: step(*batches.tensors), lambda: program(batches.tensors))
            program.compile(compiler)
    return CompiledStep(program, batches, model, optimizer, uncompiled, granted, draws)


def _require_no_trace_left(
    model: nn.Module, loss_fn: LossFunction | None, granted: Callable[[], Granted], step: Callable[[], object]
) -> bool:
    """One step that does not count, for what is proved once per model; refuse what a program would do once only.

    Returns: whether the step draws from torch's default generators.
    """
    before, known, buffers = random_state(), granted(), [(b, b.detach().clone()) for b in model.buffers()]
    around = Surroundings(model, loss_fn)
    try:
        with unchanged_buffers(model):
            step()
            written = [b for b, value in buffers if not _same(b, value)]
        after = random_state()
        changed = granted().differs_from(known)
    finally:
        restore_random_state(before)
        around.restore()
    if not same_elsewhere(before, after):
        raise EngineUnavailable(
            "the pass draws random numbers from Python or NumPy, which a compiled step would draw once only; draw them "
            "by torch, or use reweight_step"
        )
    if written or changed:
        raise EngineUnavailable(
            "the pass writes buffers or attributes of the model, or it counts or keeps something else from call to "
            "call; use reweight_step"
        )
    return not same_torch_state(before, after)


def _require_same_draws(step: Callable[[], object], program: Callable[[], object]) -> None:
    """Refuse a step that sets a generator back, as checkpointed layers do that draw their masks again: a program would
    draw other ones, and leave the generator elsewhere.
    """
    start = torch_random_state()
    step()
    after_step = torch_random_state()
    restore_random_state(start)
    program()
    if not same_torch_state(after_step, torch_random_state()):
        raise EngineUnavailable(
            "the pass sets torch's random generator (checkpointing with dropout?), which a compiled step would not do; "
            "use reweight_step, or set the model's dropout to 0"
        )


@contextmanager
def _random_state_as_before() -> Iterator[None]:
    """Torch's default generators are afterwards as they were."""
    start = torch_random_state()
    try:
        yield
    finally:
        restore_random_state(start)


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)
