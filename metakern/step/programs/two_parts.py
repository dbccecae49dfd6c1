"""A step that trains a second network along with the model, compiled as two programs.

The first ends with the gradient of the second network, whose optimizer then steps, uncompiled. The second ends with the
gradient of the model; values that it needs from the first are passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.losses import LossFunction
from metakern.capture.parameters import trainable_parameters
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.gradients import gradients_aside
from metakern.capture.state.passes import unchanged_on_error
from metakern.engines import pose
from metakern.engines.problem import Problem
from metakern.step.hand_over import hand_over, require_optimizer
from metakern.step.meta_network import step_meta_network, undone_on_error
from metakern.step.programs.assumptions import Assumptions
from metakern.step.programs.compilable import PartResult
from metakern.step.programs.own_batches import OwnBatches
from metakern.step.programs.program import Backend
from metakern.step.programs.step_program import compiled
from metakern.step.virtual import VirtualRule

Learn = Callable[[list[Tensor], dict[nn.Parameter, Tensor]], None]
"""What happens between the parts, given the values of the first and the gradient of the second network."""


@dataclass(frozen=True)
class TwoParts:
    """A step of a model and a second network, without its batches."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    network: nn.Module
    network_optimizer: torch.optim.Optimizer | None
    rule: VirtualRule
    loss_fn: LossFunction | None
    params: Any
    allow_unused: bool
    features: Any  # of the second network: a function, or None if they come with the batches
    functions: Sequence[Any]  # what it calls besides networks and loss function
    halves: Callable[[Problem, Sequence[Any], VirtualRule, str], Iterator[PartResult]]
    """A function that yields both parts, given the batches as a problem, features and other inputs, the rule at this
    step's learning rates, and the name of an engine."""

    def parts(self, given: Sequence[Any], rates: Sequence[Tensor], engine: str) -> Iterator[PartResult]:
        """One after the other, with no optimizer step in between."""
        batch, meta_batch, *others = self.with_features(given)
        posed = self.model, batch, meta_batch, self.loss_fn, self.params, "reuse"
        problem = pose(*posed, allow_unused=self.allow_unused)
        with unchanged_on_error(self.model, problem.writes), gradients_aside(problem.trainable.values()):
            halves = self.halves(problem, others, self.rule.at(rates), engine)
            yield next(halves)
            second = next(halves)
            _require_momentum(self.rule, {name: p for name, p in problem.chosen.items() if name in second.gradient})
            yield second

    def with_features(self, given: Sequence[Any]) -> list[Any]:
        """Batch, meta batch, features and anything else."""
        batch, meta_batch, features, *others = given
        return [batch, meta_batch, features if self.features is None else self.features, *others]

    def called(self) -> list[Any]:
        return [self.loss_fn, self.features, *self.functions]

    def assumptions(self) -> Assumptions:
        return Assumptions(self.both(), *self.called(), *_looked_at(self.rule, self.model))

    def both(self) -> nn.Module:
        return nn.ModuleList([self.model, self.network])

    def rates(self) -> list[Tensor]:
        device = next(self.model.parameters()).device
        return [torch.tensor(rate, dtype=torch.float64, device=device) for rate in self.rule.rates()]


class CompiledParts:
    """A `TwoParts` step, compiled for batches of the shapes and dtypes that it was built with."""

    def __init__(self, step: TwoParts, batches: OwnBatches, engine: str, compiler: Backend) -> None:
        self._step, self._trainable = step, trainable_parameters(step.model)
        self._program = compiled(
            step.both(), step.called(), step.assumptions, batches, step.parts, engine, compiler, step.rates()
        )

    @property
    def engine(self) -> str:
        return self._program.engine

    def given(self) -> list[Any]:
        """What the last step was given."""
        return self._step.with_features(self._program.given())

    def take(self, *given: Any, accumulate: bool, learn: Learn | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """One step on new batches; returns what each part computed, except gradients.

        Between the parts the second network's optimizer steps, or `learn` is called if given.

        Raises: NotThisProgram if the batches have other shapes than the compiled ones, or take another branch;
            ValueError if they differ in more than shapes and tensor values, or if anything that the step reads has
            changed in more than tensor values. Everything is then as before.
        """
        step = self._step
        run = self._program.run(*given, numbers=step.rates())
        with undone_on_error(step.network, step.network_optimizer):
            first = next(run)
            if learn is None:
                step_meta_network(step.network, step.network_optimizer, first.gradient)
            else:
                learn(first.values, first.gradient)
            second = next(run)
            with self._program.settled():
                hand_over(step.model, self._trainable, second.gradient, step.optimizer, accumulate)
        return first.values, second.values


def compilable_rule(
    problem: Problem, virtual: str, lr: float | None, optimizer: torch.optim.Optimizer | None, uncompiled: str
) -> VirtualRule:
    """The rule of a virtual step, if it can be compiled; `uncompiled` names the step that accepts every rule.

    Raises: TypeError, ValueError if rule or optimizer is not usable; EngineUnavailable for other rules.
    """
    require_optimizer(optimizer, problem.trainable)
    rule = VirtualRule(virtual, lr, optimizer)
    rule.require_usable(problem.chosen)
    if not rule.affine:
        raise EngineUnavailable(f"virtual={rule.name!r} reads the optimizer's step count; use {uncompiled}")
    return rule


def _require_momentum(rule: VirtualRule, moved: Mapping[str, nn.Parameter]) -> None:
    """Raise if a parameter that the virtual step moves has no momentum yet: later runs would read some."""
    if rule.reads_state and rule.optimizer is not None:
        held = {id(p): group["momentum"] for group in rule.optimizer.param_groups for p in group["params"]}
        for name, p in moved.items():
            if held[id(p)] and "momentum_buffer" not in rule.optimizer.state.get(p, {}):
                raise ValueError(
                    f"optimizer has no momentum of parameter '{name}' yet, which virtual={rule.name!r} reads: let it "
                    "step once before the step is compiled"
                )


def _looked_at(rule: VirtualRule, model: nn.Module) -> list[Any]:
    """What a virtual step reads from its optimizer, except learning rates: which parameters each group holds, the
    numbers of the groups, and momentum.
    """
    if rule.optimizer is None or not rule.reads_groups:
        return []
    groups, state = rule.optimizer.param_groups, rule.optimizer.state
    read = ("momentum", "dampening", "weight_decay", "maximize") if rule.reads_state else ("maximize",)
    found = [[*map(id, group["params"]), *(group.get(name) for name in read)] for group in groups]
    buffers = (state.get(p, {}).get("momentum_buffer") for p in model.parameters()) if rule.reads_state else ()
    return [*found, *buffers]
