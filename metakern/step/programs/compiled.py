"""A whole re-weighted step as one compiled program: what torch.compile does for a plain step.

    step = compile_step(model, batch, meta_batch, optimizer=optimizer)
    for batch, meta_batch in loader:
        result = step(batch, meta_batch)

The step (both passes, dots, weights, weighted gradient) is traced down to torch's own operators and given to inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.losses import LossFunction
from metakern.capture.members import parameters_of
from metakern.capture.parameters import trainable_parameters
from metakern.capture.state.gradients import gradients_as_before
from metakern.step.hand_over import hand_over, require_optimizer
from metakern.step.programs.assumptions import Assumptions
from metakern.step.programs.compilable import PartResult
from metakern.step.programs.own_batches import OwnBatches
from metakern.step.programs.program import Backend, compiler_of
from metakern.step.programs.step_program import NotThisProgram, StepProgram, compiled
from metakern.step.result import StepResult
from metakern.step.reweight import reweight_step


class CompiledStep:
    """The step that `compile_step` compiled; call it with batches of the shapes and dtypes it was compiled with."""

    def __init__(
        self,
        model: nn.Module,
        program: StepProgram,
        trainable: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
        uncompiled: Callable[..., StepResult],
    ) -> None:
        self._program, self._optimizer, self._uncompiled = program, optimizer, uncompiled
        self._model, self._trainable = model, trainable

    def __call__(self, batch: Any, meta_batch: Any, *, accumulate: bool = False) -> StepResult:
        """One step on new batches, as `reweight_step` would take it.

        If a batch has other shapes than the compiled one (the last of an epoch), or takes another branch of the model's
        code (as a non-finite loss does), the step runs uncompiled.

        Args:
            batch, meta_batch: n and m examples, in the form of the compiled ones.
            accumulate: add to `.grad` instead of replacing it.

        Returns: `StepResult(weights [n], dots [n], losses [n], meta_loss [], engine)`.

        Raises: ValueError if a batch differs from the compiled one in more than shapes and tensor values, or if
            anything that model, loss function or rule read has changed in more than tensor values; otherwise as
            `reweight_step`.
        """
        try:
            with self._program.nothing_drawn_on_error():
                return self._taken(batch, meta_batch, accumulate)
        except NotThisProgram:
            return self._uncompiled(*self._program.given(), accumulate=accumulate)

    def _taken(self, batch: Any, meta_batch: Any, accumulate: bool) -> StepResult:
        found = next(self._program.run(batch, meta_batch))
        weights, dots, losses, meta_loss = found.values
        with self._program.settled():
            hand_over(self._model, self._trainable, found.gradient, self._optimizer, accumulate)
        return StepResult(weights, dots, losses, meta_loss, found.engine)


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
    allow_unused: bool = False,
    backend: str | Backend = "inductor",
) -> CompiledStep:
    """Compile `reweight_step` into one program; parameters, gradients, buffers and random state are left unchanged.
    What the model records on its very first call (transformers' `config.problem_type`) stays recorded.

    weights = rule(dots);  .grad = sum_n weights_n dl_n/dtheta

    Shapes and autocast settings are fixed by this call, and the optimizer steps uncompiled. Rounding differs from the
    uncompiled step, as it does between compiled and uncompiled plain steps. Numbers, flags, functions and tensors that
    model, loss and rule read are fixed as well: if one of them is changed or replaced, the compiled step raises an
    error. Buffers written in the pass (running statistics) are written once per step. Dropout draws new masks in every
    step, from torch's generator, though in a different order under inductor. Compiling takes tens of seconds, for deep
    networks minutes.

    Args:
        batch, meta_batch: tuples, lists or dicts of tensors; the compiled step takes others of the same shapes.
        backend: as for `torch.compile`.
        Others: as for `reweight_step`.
    Returns: `CompiledStep`, called as `step(batch, meta_batch) -> StepResult`.
    Raises:
        NotImplementedError: the pass draws random numbers from Python or NumPy, or seeds torch's generator; writes
            attributes, or replaces buffers by other tensors; reads numbers from tensors, or selects rows by value.
            `reweight_step` handles all of these.
        Otherwise as `reweight_step`.
    """
    compiler, trainable = compiler_of(backend), trainable_parameters(model)
    require_optimizer(optimizer, trainable)
    batches = OwnBatches(batch=batch, meta_batch=meta_batch)

    def take(batch: Any, meta_batch: Any, engine: str = engine, **settings: Any) -> StepResult:
        return reweight_step(
            model,
            batch,
            meta_batch,
            rule=rule,
            loss_fn=loss_fn,
            engine=engine,
            params=params,
            dot_precision=dot_precision,
            allow_unused=allow_unused,
            **settings,
        )

    def parts(given: list[Any], numbers: Sequence[Tensor], engine: str) -> Iterator[PartResult]:
        *result, used = take(given[0], given[1], engine)
        yield PartResult(used, result, {name: p.grad for name, p in trainable.items() if p.grad is not None})

    def assumptions() -> Assumptions:
        return Assumptions(model, loss_fn, rule)

    with gradients_as_before(parameters_of(model)):
        program = compiled(model, [loss_fn], assumptions, batches, parts, engine, compiler)

    def uncompiled(*given: Any, accumulate: bool) -> StepResult:
        return take(*given, optimizer=optimizer, accumulate=accumulate)

    return CompiledStep(model, program, trainable, optimizer, uncompiled)
