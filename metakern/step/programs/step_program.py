"""A step as a program, with everything that it reads and writes: batches, buffers, random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from metakern.capture.parameters import require_gradients
from metakern.capture.state.passes import unchanged_on_error
from metakern.capture.state.random_state import restore_random_state, torch_random_state
from metakern.engines.jvp import without_fused_lstm
from metakern.step.programs.assumptions import Assumptions
from metakern.step.programs.compilable import (
    PartResult,
    observe,
    require_compiled_as_traced,
    require_same,
    restored_on_error,
    torch_random_state_as_before,
)
from metakern.step.programs.other_values import OtherValues
from metakern.step.programs.own_batches import OwnBatches
from metakern.step.programs.own_buffers import OwnBuffers
from metakern.step.programs.program import Backend, Program, traced

Parts = Callable[[list[Any], Sequence[Tensor], str], Iterator[PartResult]]
"""What a step computes part by part, given batches, numbers and the name of an engine."""


class NotThisProgram(Exception):
    """Raised if batches have other shapes than the compiled ones, or take another branch."""


class PartForm(NamedTuple):
    """What a part of a program returns, in this order; after the last part come the buffers."""

    values: int
    keys: tuple[Any, ...]  # of the gradient
    more: bool


class StepProgram:
    """A compiled step; between its parts the caller may change what later parts read."""

    def __init__(
        self,
        program: Program,
        batches: OwnBatches,
        buffers: OwnBuffers,
        assumptions: Callable[[], Assumptions],
        forms: Sequence[PartForm],
        engine: str,
        draws: bool,
    ) -> None:
        self._program, self._batches, self._buffers, self._draws = program, batches, buffers, draws
        self._assumptions, self._known, self._forms = assumptions, assumptions(), forms
        self._left: list[Tensor] = []  # the buffers at the end of the last run
        self._others: list[Any] | None = None  # the last batches, if they had other shapes
        self.engine = engine

    def run(self, *given: Any, numbers: Sequence[Tensor] = ()) -> Iterator[PartResult]:
        """What each part computes for new batches.

        Raises: NotThisProgram if a batch has other shapes than the compiled one, or takes another branch (as a
            non-finite loss does); ValueError if more differs than shapes and tensor values, or if anything that the
            step reads has changed in more than tensor values.
        """
        require_gradients()
        self._known.require(self._assumptions())
        self._others = None if self._batches.fit(*given) else list(given)
        if self._others is not None:
            raise NotThisProgram
        self._batches.take(*given)
        tensors = [*self._batches.tensors, *numbers, *self._buffers.tensors]
        for form, found in zip(self._forms, self._program(tensors)):
            if found is None:
                raise NotThisProgram
            end = form.values + len(form.keys)
            self._left = found[end:]
            gradient = dict(zip(form.keys, found[form.values : end], strict=True))
            yield PartResult(self.engine, found[: form.values], gradient, form.more)

    @contextmanager
    def nothing_drawn_on_error(self) -> Iterator[None]:
        """Torch's default generators are restored if an exception leaves the block."""
        start = torch_random_state() if self._draws else None
        try:
            yield
        except BaseException:
            if start is not None:
                restore_random_state(start)
            raise

    def given(self) -> list[Any]:
        """The batches of the last run."""
        return self._batches.built() if self._others is None else self._others

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside the block and after it the buffers are as the last run left them, unless an exception leaves it."""
        before = [buffer.clone() for buffer in self._buffers.tensors]
        self._buffers.take(self._left)
        try:
            yield
        except BaseException:
            self._buffers.take(before)
            raise


def compiled(
    model: nn.Module,
    functions: Sequence[Any],
    assumptions: Callable[[], Assumptions],
    batches: OwnBatches,
    parts: Parts,
    engine: str,
    backend: Backend,
    numbers: Sequence[Tensor] = (),
) -> StepProgram:
    """Run the step once, for checks that are made once, trace it, compare the program with it, and compile it.

    `functions` are what the step calls besides the model. Gradients are left as the step leaves them.
    """

    def once(tensors: list[Tensor] | None = None, engine: str = engine) -> PartResult:
        found = list(parts(batches.built(tensors), numbers, engine))
        return PartResult(found[-1].engine, [tensor for part in found for tensor in part.tensors], {})

    with unchanged_on_error(model), torch_random_state_as_before():
        seen = observe(model, functions, assumptions, once)
        others = OtherValues(seen)
        others.observe(model, functions, batches.tensors, lambda tensors: once(tensors, seen.engine).values)
        buffers = OwnBuffers(model, seen.buffers)
        own, forms = len(batches.tensors), list[PartForm]()

        def step(*tensors: Tensor) -> Iterator[list[Tensor]]:
            end = own + len(numbers)
            with buffers.copied(tensors[end:]) as written:
                for part in parts(batches.built(list(tensors[:own])), tensors[own:end], seen.engine):
                    forms.append(PartForm(len(part.values), tuple(part.gradient), part.more))
                    yield part.tensors if part.more else [*part.tensors, *written]

        given = [*batches.tensors, *numbers]
        with restored_on_error(seen.function_state):
            with without_fused_lstm(model):
                program = traced(step, [*given, *buffers.tensors])
            require_same(program, seen, given)
            others.require_same(program, numbers)
            program.compile(backend)
            require_compiled_as_traced(program, seen, given)
    return StepProgram(program, batches, buffers, assumptions, forms, seen.engine, seen.draws)
