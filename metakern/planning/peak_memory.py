"""Peak memory of a plain step and of metakern's, counted in passes that the plan runs itself.

Whole batches are run once, as each kind of step would run them. For a step in parts, two parts of each batch are run,
since more parts need no more memory. Checks made only in the first step of a model are not included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from metakern.capture.state.buffers import unchanged_buffers
from metakern.capture.state.passes import PassState
from metakern.engines import ghost, jvp, micro_batch
from metakern.engines.cut import cut
from metakern.engines.part import examples_in, part_of
from metakern.engines.problem import Problem
from metakern.engines.recorded import recorded
from metakern.engines.weighted_backward import weighted_backward
from metakern.planning.live_storage import LiveStorage


class Memory(NamedTuple):
    """Bytes at the peak, beyond those before the step; for memory="reuse", the peaks of its four phases."""

    plain: int  # a plain step
    train: int  # the train pass back to its first use: what autograd keeps, every A, every B met so far
    meta: int  # every A and B, and a pass of the meta batch; by parts, these passes alone
    dots: int  # every A and B, V, and the meta records of the pairs form; by parts, the train pass of one and its dots
    gradient: int  # every A and B not taken yet, and the gradients that are there; of the whole batch or half of it
    two_pass: int  # the largest phase of memory="two_pass"

    @property
    def reuse(self) -> int:
        return max(self.train, self.meta, self.dots, self.gradient)


def later_step(problem: Problem, **changes: str) -> Problem:
    """The problem of a step that is not a model's first, in which nothing is compared with autograd."""
    return replace(problem, reached=set(), compared=False, **changes)


def by_ghost(problem: Problem) -> Memory:
    """The peaks of a step by ghost."""
    return _by_phases(problem, _ghost_phases)


def _ghost_phases(problem: Problem) -> list[int]:
    # While operators are watched, some views are made by other operators: a structure that may be new, and is proved.
    with LiveStorage() as live:
        train = recorded(problem)
        live.take_peak()
        train.weighted_gradient(_weights(train.losses, every=2))
        half = live.take_peak()
        del train
    with LiveStorage() as live:
        train = recorded(problem)
        peaks = [live.take_peak()]
        meta = ghost._meta_pass(problem, train.trace, whole=False)
        peaks.append(live.take_peak())
        train.dots_along(meta.direction, meta.paired)
        peaks.append(live.take_peak())
        del meta
        train.weighted_gradient(_weights(train.losses))
    return [*peaks, max(half, live.take_peak())]


def by_forward_mode(problem: Problem) -> Memory:
    """The peaks of a step by forward mode; its phase "dots" is the dual pass.

    Raises: EngineUnavailable: forward mode does not support the model either.
    """
    return _by_phases(problem, _dual_phases)


def _by_phases(problem: Problem, phases: Callable[[Problem], list[int]]) -> Memory:
    reuse, two_pass = (phases(later_step(problem, memory=memory)) for memory in ("reuse", "two_pass"))
    train, meta, dots, gradient = reuse
    return Memory(max(_plain(problem)), train, meta, dots, gradient, max(two_pass))


def _dual_phases(problem: Problem) -> list[int]:
    start = PassState(problem.model, problem.loss_fn, problem.writes)
    with unchanged_buffers(problem.model), LiveStorage() as live:
        with jvp.first_pass(problem) as products:
            losses = problem.batch_losses()
        peaks = [live.take_peak()]
        _, direction = problem.meta_gradient()
        peaks.append(live.take_peak())
        jvp.loss_tangents(problem, direction, start, losses.detach(), products)
        peaks.append(live.take_peak())
        del direction, products
        weighted_backward(problem, losses, _weights(losses), form=jvp.PLAIN_ATTENTION)
    return [*peaks, live.take_peak()]


def by_parts(problem: Problem, size: int) -> Memory:
    """The peaks of a step with `micro_batch`; train and dots are one phase."""
    few = _first(problem, 2 * size)
    reuse, two_pass = (_part_phases(replace(few, memory=memory), size) for memory in ("reuse", "two_pass"))
    meta, dots, gradient = reuse
    return Memory(_plain_of_all(problem, size), dots, meta, dots, gradient, max(two_pass))


def _part_phases(problem: Problem, size: int) -> list[int]:
    peaks = []

    def along(v: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        peaks.append(live.take_peak())
        return v

    for _ in range(2):  # the first checks more than later ones
        with LiveStorage() as live:
            answer = micro_batch.solve(problem, size, along)
            peaks.append(live.take_peak())
            answer.weighted_gradient(_weights(answer.losses))
            peaks.append(live.take_peak())
    return peaks[-3:]


def _first(problem: Problem, size: int) -> Problem:
    """The first `size` examples of both batches as a problem."""
    batch, meta_batch = (cut(getattr(problem, name), size, name)[0] for name in ("batch", "meta_batch"))
    return part_of(problem, batch, set(), meta_batch=meta_batch)


def _plain(problem: Problem) -> Sequence[int]:
    """The bytes that a plain step holds after each operator."""
    with unchanged_buffers(problem.model), LiveStorage() as live:
        losses = problem.batch_losses()
        weighted_backward(problem, losses, _weights(losses), only=problem.trainable)
    return live.settled()


def _plain_of_all(problem: Problem, size: int) -> int:
    """The peak of a plain step over the whole batch, extrapolated linearly from one part and two."""
    few, more = (_first(problem, max(times * size, 2)) for times in (1, 2))
    whole, less, some = (examples_in(each.batch) for each in (problem, few, more))
    one, two = _plain(few), _plain(more)
    if len(one) != len(two):
        one, two = [max(one)], [max(two)]
    share = (whole - some) / (some - less) if some > less else 0.0
    return round(max(b + share * (b - a) for a, b in zip(one, two)))


def _weights(losses: Tensor, every: int = 1) -> Tensor:
    """Equal weights for every example, or for each `every`-th one; zero for the others."""
    weights = torch.zeros_like(losses)
    weights[::every] = 1 / max(len(losses), 1)
    return weights
