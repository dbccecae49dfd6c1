"""The ghost engine a few examples at a time: the whole batch's dots and weights, the memory of one part.

    V     = (1/m) sum_j dl'_j/dtheta      meta batch, part by part
    dots  = <dl_n/dtheta, V>              first pass over the parts; only the dots and losses of a part are kept
    .grad = sum_n weights_n dl_n/dtheta   second pass over the parts that have non-zero weight

Each part is run twice, with the same random numbers, buffers and attributes, so a step costs one more forward and one
more backward pass. Between the passes, weights are computed from all n dots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metakern.capture.refusal import EngineUnavailable
from metakern.capture.repeatable import repeatable_layers
from metakern.capture.state.passes import PythonState
from metakern.capture.state.random_state import RandomState, random_state, restore_random_state
from metakern.engines.choose import normalises_over_batch
from metakern.engines.cut import cut
from metakern.engines.group import mean_over_group
from metakern.engines.part import examples_in, part_of, require_count, require_independent, require_same_in_parts
from metakern.engines.part_buffers import PartBuffers
from metakern.engines.problem import Answer, Problem
from metakern.engines.recorded import recorded
from metakern.engines.repetition import require_repetition
from metakern.engines.weighted_backward import weighted_backward

Along = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def several_parts(problem: Problem, engine: str, size: Any) -> bool:
    """Whether one of the batches has more than `size` examples.

    Raises: TypeError, ValueError if `size` is not a positive int, the engine does not support parts, or a batch cannot
        be split.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"micro_batch must be None or a positive int, got {size!r}")
    if engine not in ("auto", "ghost"):
        raise ValueError(f"micro_batch needs engine='ghost' (or 'auto'), got {engine!r}")
    return any(len(cut(getattr(problem, name), size, name)) > 1 for name in ("batch", "meta_batch"))


def solve(problem: Problem, size: int, along: Along) -> Answer:
    """Dots along `along(V)` and the weighted gradient, `size` examples at a time.

    Raises:
        EngineUnavailable: examples interact, or a part of the batch is not treated as the whole would be.
    """
    if normalises_over_batch(problem.model):
        raise EngineUnavailable(
            "examples interact: batch_norm in training mode takes its statistics over the batch, and those of a part "
            "differ; leave out micro_batch, or put the model's normalisation in eval mode"
        )
    meta_loss, direction = _meta_gradient(problem, size)
    parts = _Parts(problem, size)
    dots, losses = parts.dots(problem.by_identity(along(direction)))
    require_same_in_parts(problem, problem.batch, size, "batch")
    if problem.writes:
        raise EngineUnavailable(
            "the forward pass writes into parameters, and in parts it would do so several times; leave out micro_batch"
        )
    return Answer(dots, losses, meta_loss, parts.weighted_gradient)


class _Parts:
    """The train batch, part by part, and what is needed to run each part again."""

    def __init__(self, problem: Problem, size: int) -> None:
        self._problem, self._size, self._starts = problem, size, list[tuple[RandomState, PythonState]]()
        self._batches, self._losses = cut(problem.batch, size, "batch"), list[Tensor]()
        self._buffers = PartBuffers(problem.model)

    def dots(self, direction: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Dots and losses of all parts, [n] each; buffers are then as after one pass over the whole batch."""
        if self._size == 1:  # a single example says nothing about independence
            require_independent(self._problem, cut(self._problem.batch, 2, "batch")[0])
        found, reached = [], set[int]()
        for batch in self._batches:
            self._starts.append((random_state(), self._held()))
            part = part_of(self._problem, batch, reached)
            with self._buffers.of_part(examples_in(batch)):
                train = recorded(part)
                require_count(train.losses, batch)
                found.append((train.dots_along(direction), train.losses))
            del train
        self._problem.require_participation(reached)
        self._buffers.finish()
        dots, self._losses = zip(*found)
        return torch.cat(dots), torch.cat(self._losses)

    def weighted_gradient(self, weights: Tensor) -> dict[str, Tensor]:
        """sum_n weights_n dl_n/dtheta by name; parts without weight are not run."""
        total: dict[str, Tensor] = {}
        after, now = random_state(), self._held()
        try:
            shares = zip(self._batches, self._starts, self._losses, weights.split(self._size), strict=True)
            for batch, (state, held), losses, some in shares:
                if bool((some != 0).any()):
                    restore_random_state(state)
                    held.restore()
                    with self._buffers.replayed():
                        self._add(total, batch, losses, some)
        finally:
            restore_random_state(after)
            now.restore()
        trainable = self._problem.trainable
        found = {
            name: total[name].to(p.dtype) if name in total else torch.zeros_like(p) for name, p in trainable.items()
        }
        return self._problem.without_unused(found)

    def _held(self) -> PythonState:
        return PythonState(self._problem.model, self._problem.loss_fn)

    def _add(self, total: dict[str, Tensor], batch: Any, losses: Tensor, weights: Tensor) -> None:
        part = part_of(self._problem, batch, set())
        with repeatable_layers(part.model):
            again = part.batch_losses()
        require_repetition(again.detach(), losses)
        for name, grad in weighted_backward(part, again, weights, only=part.trainable).items():
            grad = grad if grad.dtype == torch.float64 else grad.float()  # a sum of parts in half precision would drift
            total[name] = total[name] + grad if name in total else grad


def _meta_gradient(problem: Problem, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """As `Problem.meta_gradient`, by parts if the meta batch is larger than one."""
    batches = cut(problem.meta_batch, size, "meta_batch")
    if len(batches) == 1:
        return problem.meta_gradient()
    m = sum(map(examples_in, batches))
    losses, total = list[Tensor](), dict[str, Tensor]()
    for batch in batches:
        share = examples_in(batch) / m
        part = part_of(problem, problem.batch, set(), meta_batch=batch, process_group=None)
        one, gradient = part.meta_gradient()
        losses.append(share * one)
        for name, v in gradient.items():
            total[name] = total[name].add(v, alpha=share) if name in total else v * share
    require_independent(problem, cut(problem.meta_batch, max(size, 2), "meta_batch")[0])
    require_same_in_parts(problem, problem.meta_batch, size, "meta_batch")
    return sum(losses[1:], losses[0]), mean_over_group(total, problem.chosen, m, problem.process_group)
