"""A whole step of a weight net as a program in two parts; between them the weight net's optimizer steps.

    step = compile_mwnet_step(model, weight_net, batch, meta_batch, weight_optimizer=..., virtual_lr=0.1)
    for batch, meta_batch in loader:
        result = step(batch, meta_batch)

The first part ends with the meta-gradient. What the second one needs of the train pass is handed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.losses import LossFunction
from metakern.capture.parameters import trainable_parameters
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state import unchanged_on_error
from metakern.engines import pose
from metakern.step.compilable import Found
from metakern.step.granted import Granted
from metakern.step.hand_over import hand_over, require_optimizer
from metakern.step.meta_network import Features, step_meta_network, undone_on_error
from metakern.step.mwnet import MetaStepResult, meta_gradient, mwnet_step, require_weight_net
from metakern.step.own_batches import OwnBatches
from metakern.step.program import Backend
from metakern.step.step_program import AnotherWay, StepProgram, compiled
from metakern.step.virtual import VirtualRule
from metakern.step.weighting import Weighting


class CompiledMetaStep:
    """The step that `compile_mwnet_step` compiled; call it with batches of the shapes and dtypes it was made with."""

    def __init__(self, step: _Step, program: StepProgram) -> None:
        self._step, self._program, self._trainable = step, program, trainable_parameters(step.model)

    def __call__(
        self, batch: Any, meta_batch: Any, features: Any = None, *, accumulate: bool = False
    ) -> MetaStepResult:
        """One step on new batches and features, as `mwnet_step` takes it.

        Where they take another branch of the code than the compiled one (a loss that is not finite among them), the
        step is taken uncompiled.

        Raises: ValueError when a batch differs from the compiled one by more than the values of its tensors, or what
            the step looks at has changed by more than the values of tensors; else as `mwnet_step`.
        """
        run = self._program.run(batch, meta_batch, features, numbers=self._step.rates())
        try:
            with undone_on_error(self._step.weight_net, self._step.weight_optimizer):
                return self._taken(run, accumulate)
        except AnotherWay:
            return self._step.uncompiled(*self._program.given(), accumulate=accumulate)

    def _taken(self, run: Iterator[list[Tensor]], accumulate: bool) -> MetaStepResult:
        step, trainable = self._step, self._trainable
        dots, meta_loss, *gradient = next(run)
        step_meta_network(step.weight_net, step.weight_optimizer, dict(zip(step.learnt, gradient, strict=True)))
        found = next(run)
        weights, losses, *gradient = found[: 2 + len(trainable)]
        hand_over(trainable, dict(zip(trainable, gradient)), step.optimizer, accumulate)
        self._program.settle(found)
        return MetaStepResult(weights, dots, losses, meta_loss, self._program.engine)


@dataclass
class _Step:
    """What `compile_mwnet_step` was given, but for the batches."""

    model: nn.Module
    weight_net: nn.Module
    weight_optimizer: torch.optim.Optimizer | None
    optimizer: torch.optim.Optimizer | None
    rule: VirtualRule
    weighting: Weighting
    features: Any  # a function, or None where they come with the batches
    loss_fn: LossFunction | None
    engine: str
    params: Any
    learnt: tuple[nn.Parameter, ...] = ()  # what the weight net's gradient is of

    def parts(self, given: list[Any], rates: Sequence[Tensor], engine: str) -> Iterator[Found]:
        """Up to the meta-gradient; and from the new weights on."""
        problem = pose(self.model, given[0], given[1], self.loss_fn, self.params, "reuse")
        features = Features(given[2] if self.features is None else self.features)
        with unchanged_on_error(self.model, problem.writes):
            found = meta_gradient(problem, self.weighting, features, self.rule.at(rates), engine)
            train, used, dots, meta_loss, gradient = found
            self.learnt = tuple(gradient)
            yield Found(used, [dots, meta_loss, *gradient.values()], more=True)
            weights = self.weighting.weights(train.losses, features.values)
            weighted = train.weighted_gradient(weights)
            yield Found(used, [weights, train.losses, *(weighted[name] for name in problem.trainable)])

    def granted(self) -> Granted:
        both = nn.ModuleList([self.model, self.weight_net])
        return Granted(both, self.loss_fn, self.features, *_looked_at(self.rule, self.model))

    def rates(self) -> list[Tensor]:
        device = next(self.model.parameters()).device
        return [torch.tensor(rate, dtype=torch.float64, device=device) for rate in self.rule.rates()]

    def uncompiled(self, batch: Any, meta_batch: Any, features: Any, *, accumulate: bool) -> MetaStepResult:
        return mwnet_step(
            self.model,
            self.weight_net,
            batch,
            meta_batch,
            weight_optimizer=self.weight_optimizer,
            virtual_lr=self.rule.lr,
            features=features if self.features is None else self.features,
            normalise=self.weighting.normalise,
            detach_losses=self.weighting.detach_losses,
            virtual=self.rule.name,
            loss_fn=self.loss_fn,
            optimizer=self.optimizer,
            engine=self.engine,
            params=self.params,
            accumulate=accumulate,
        )


def compile_mwnet_step(
    model: nn.Module,
    weight_net: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    weight_optimizer: torch.optim.Optimizer | None,
    virtual_lr: float | None,
    features: Any = None,
    normalise: str = "sum",
    detach_losses: bool = True,
    virtual: str = "sgd",
    loss_fn: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    engine: str = "auto",
    params: Any = None,
    backend: str | Backend = "inductor",
) -> CompiledMetaStep:
    """Compile `mwnet_step`; model, weight net, gradients, buffers and random state stay as they are.

    G(l; phi) = sum_n w_n l_n / S,  theta^ = theta - update(sum_n c_n g_n),  s_n = <g_n(theta), v>
    d meta_loss(theta^)/dphi = - sum_n s_n dc_n/dphi;  .grad = sum_n w_n g_n / S with the new phi

    Both optimizers step uncompiled, so they may be any, and their learning rates may change, with virtual_lr=None that
    of the virtual step as well. The rest is as for `compile_step`: shapes are those given here, numbers and functions
    that the step looks at are those of this call.

    Args:
        batch, meta_batch: tuples, lists or dicts of tensors; the compiled step takes others of the same shapes.
        features: tensors are given anew with every step; a function is called in each, and keeps nothing.
        virtual: "sgd", "momentum" or "nesterov".
        backend: as for `torch.compile`.
        The others: as for `mwnet_step`.
    Returns: `CompiledMetaStep`, called as `step(batch, meta_batch, features=None) -> MetaStepResult`.
    Raises:
        NotImplementedError: as for `compile_step`, and for other virtual steps; `mwnet_step` serves all of these.
        ValueError: the virtual step reads momentum that is not there yet; let the optimizer step once before.
        The others: as `mwnet_step`.
    """
    require_weight_net(weight_net, weight_optimizer, normalise, model)
    problem = pose(model, batch, meta_batch, loss_fn, params, "reuse")
    require_optimizer(optimizer, problem.trainable)
    rule = VirtualRule(virtual, virtual_lr, optimizer)
    rule.require_usable(problem.chosen)
    _require_compilable(rule, problem.chosen)
    asked = features if callable(features) and not isinstance(features, Tensor) else None
    weighting = Weighting(weight_net, normalise, detach_losses)
    step = _Step(model, weight_net, weight_optimizer, optimizer, rule, weighting, asked, loss_fn, engine, params)
    batches = OwnBatches(batch=batch, meta_batch=meta_batch, features=None if asked is not None else features)
    both, called = nn.ModuleList([model, weight_net]), [loss_fn, asked]
    compiler = torch._dynamo.lookup_backend(backend)
    return CompiledMetaStep(
        step, compiled(both, called, step.granted, batches, step.parts, engine, compiler, step.rates())
    )


def _require_compilable(rule: VirtualRule, chosen: dict[str, nn.Parameter]) -> None:
    if not rule.affine:
        raise EngineUnavailable(f"virtual={rule.name!r} reads the optimizer's count of steps; use mwnet_step")
    if rule.reads_state and rule.optimizer is not None:
        held = {id(p): group["momentum"] for group in rule.optimizer.param_groups for p in group["params"]}
        for name, p in chosen.items():
            if held[id(p)] and "momentum_buffer" not in rule.optimizer.state.get(p, {}):
                raise ValueError(
                    f"optimizer has no momentum of parameter '{name}' yet, which virtual={rule.name!r} reads: let it "
                    "step once before the step is compiled"
                )


def _looked_at(rule: VirtualRule, model: nn.Module) -> list[Any]:
    """What a virtual step reads of its optimizer, but for learning rates."""
    if not rule.reads_state or rule.optimizer is None:
        return []
    read = ("momentum", "dampening", "weight_decay", "maximize")
    groups = [[group[name] for name in read] for group in rule.optimizer.param_groups]
    return [*groups, *(rule.optimizer.state.get(p, {}).get("momentum_buffer") for p in model.parameters())]
