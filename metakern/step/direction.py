"""What the dots are taken with: the meta gradient V, or a direction derived from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metakern.capture.parameters import trainable_parameters
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.passes import RestorePoint
from metakern.engines import Answer, Problem, frozen_statistics, micro_batch, pairwise, solve
from metakern.engines.choose import normalises_over_batch, open_pass
from metakern.engines.train_pass import answered
from metakern.step.virtual import VirtualRule

Direction = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def with_weight_decay(model: nn.Module, weight_decay: float) -> Direction:
    """v = V + weight_decay * theta: weight decay in the meta loss, as in the CIFAR code of Ren et al. (2018)."""
    parameters = trainable_parameters(model)
    return lambda v: {name: g.add(parameters[name].detach(), alpha=weight_decay) for name, g in v.items()}


def preconditioned(model: nn.Module, optimizer: Optimizer, virtual: str = "adam_frozen") -> Direction:
    """v = J V with J = d update/d gradient of `optimizer` at gradient zero, from its current state.

    Which example helps if the step is the optimizer's and not plain descent; J is read at every step. While Adam's
    moments are empty, J = lr / eps in every entry, so nothing is preconditioned.
    """
    parameters = trainable_parameters(model)
    rule = VirtualRule(virtual, None, optimizer)
    rule.require_usable(parameters)

    def along(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rule.origin({name: parameters[name] for name in v}).pulled_back(dict(v))

    return along


def solve_along(
    problem: Problem,
    start: RestorePoint,
    engine: str,
    direction: Direction | None,
    size: int | None = None,
    batchnorm: str = "exact",
) -> tuple[Answer, str]:
    """As `solve`, with the dots along `direction(V)`; in parts of `size` examples, or with frozen batch statistics.

    Raises: ValueError unless `direction` returns, for chosen parameters only, tensors of their shapes; also for
        settings that cannot be combined.
    """
    _require_precision(problem, engine)
    if direction is not None and not callable(direction):
        raise TypeError(f"direction must be a function of the meta gradient or None, got {type(direction).__name__}")

    def along(v: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return _directed(problem, v, direction)

    problem.writes.keep_functions(problem.loss_fn)
    if _freezes(problem, engine, size, batchnorm):
        try:
            return frozen_statistics.solve(problem, along), FROZEN
        except EngineUnavailable:
            if engine != "auto":
                raise
            start.restore()
    if size is not None and micro_batch.several_parts(problem, engine, size):
        return micro_batch.solve(problem, size, along), "ghost"
    if direction is None:
        return solve(problem, engine, start)
    train, used = open_pass(problem, engine, start)
    return answered(train, problem, along), used


def solve_pairwise(
    problem: Problem, start: RestorePoint, engine: str, size: int | None, batchnorm: str
) -> tuple[Answer, str]:
    """As `solve`, with the dots along the gradient of each meta example, [n, m].

    Raises: ValueError for settings that cannot be combined.
    """
    _require_precision(problem, engine)
    if size is not None:
        raise ValueError("pairwise and micro_batch cannot be combined: call grad_dots on each part of the batch")
    if batchnorm != "exact":
        raise ValueError(f"pairwise dots are exact: batchnorm must be 'exact', got {batchnorm!r}")
    return pairwise.solve(problem, engine, start)


def _require_precision(problem: Problem, engine: str) -> None:
    if problem.dot_precision != "same" and engine not in ("auto", "ghost"):
        raise ValueError(f"dot_precision={problem.dot_precision!r} is for engine='ghost' (or 'auto'), got {engine!r}")


FROZEN = "ghost_frozen"
"""The name of the ghost engine with frozen batch statistics in results: the only answer that is an approximation."""


def _freezes(problem: Problem, engine: str, size: int | None, batchnorm: str) -> bool:
    """Whether batch statistics are to be treated as constants, and there are any."""
    if batchnorm not in ("exact", "frozen"):
        raise ValueError(f"batchnorm must be 'exact' or 'frozen', got {batchnorm!r}")
    if batchnorm == "exact":
        return False
    if engine not in ("auto", "ghost"):
        raise ValueError(f"batchnorm='frozen' is for engine='ghost' (or 'auto'); {engine!r} is exact without it")
    if size is not None:
        raise ValueError("batchnorm='frozen' and micro_batch cannot be combined: a part has other statistics")
    return normalises_over_batch(problem.model)


def _directed(problem: Problem, v: Mapping[str, Tensor], direction: Direction | None) -> Mapping[str, Tensor]:
    """`direction` of the meta gradient in all chosen parameters, zero where the meta loss has no gradient."""
    if direction is None:
        return v
    every = {name: v[name] if name in v else torch.zeros_like(p) for name, p in problem.chosen.items()}
    along = direction(every)
    _require_like(along, every)
    return along


def _require_like(along: Any, v: Mapping[str, Tensor]) -> None:
    if not isinstance(along, Mapping):
        raise TypeError(f"direction must return a mapping from parameter names to tensors, got {type(along).__name__}")
    for name, tensor in along.items():
        if name not in v:
            raise ValueError(f"direction returned '{name}', which is not among the parameters of the dots")
        if not isinstance(tensor, Tensor) or tensor.shape != v[name].shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"direction returned {got} for '{name}', expected a tensor of shape {tuple(v[name].shape)}"
            )
