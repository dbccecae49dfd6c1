"""A whole weight-net step as two compiled programs; the weight net's optimizer steps in between.

    step = compile_mwnet_step(model, weight_net, batch, meta_batch, weight_optimizer=..., virtual_lr=0.1)
    for batch, meta_batch in loader:
        result = step(batch, meta_batch)

Values that the second needs from the train pass, such as A and B, are passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from metakern.capture.losses import LossFunction
from metakern.capture.state.passes import RestorePoint
from metakern.engines import pose
from metakern.engines.problem import Problem
from metakern.step.meta_network import Features, are_asked_for
from metakern.step.mwnet import MetaStepResult, meta_gradient, mwnet_step, require_weight_net
from metakern.step.programs.compilable import PartResult
from metakern.step.programs.own_batches import OwnBatches
from metakern.step.programs.program import Backend, compiler_of
from metakern.step.programs.step_program import NotThisProgram
from metakern.step.programs.two_parts import CompiledParts, TwoParts, compilable_rule
from metakern.step.virtual import VirtualRule
from metakern.step.weighting import Weighting


class CompiledMetaStep:
    """The step that `compile_mwnet_step` compiled; call it with batches of the compiled shapes and dtypes."""

    def __init__(self, parts: CompiledParts, uncompiled: Callable[..., MetaStepResult]) -> None:
        self._parts, self._uncompiled = parts, uncompiled

    def __call__(
        self, batch: Any, meta_batch: Any, features: Any = None, *, accumulate: bool = False
    ) -> MetaStepResult:
        """One step on new batches and features, as `mwnet_step` would take it.

        If they have other shapes than the compiled ones, or take another branch of the code (as a non-finite loss
        does), the step runs uncompiled.

        Args:
            batch, meta_batch: n and m examples, in the form of the compiled ones.
            features: tensors as those given to `compile_mwnet_step`; None if it was given a function, or none.
            accumulate: add to `.grad` of the model instead of replacing it.

        Returns: `MetaStepResult(weights [n], dots [n], losses [n], meta_loss [], engine)`, meta_loss at theta^.

        Raises: ValueError if a batch differs from the compiled one in more than shapes and tensor values, or if
            anything that the step reads has changed in more than tensor values; otherwise as `mwnet_step`.
        """
        try:
            first, second = self._parts.take(batch, meta_batch, features, accumulate=accumulate)
        except NotThisProgram:
            batch, meta_batch, features = self._parts.given()
            return self._uncompiled(batch, meta_batch, features=features, accumulate=accumulate)
        (dots, meta_loss), (weights, losses) = first, second
        return MetaStepResult(weights, dots, losses, meta_loss, self._parts.engine)


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
    allow_unused: bool = False,
    backend: str | Backend = "inductor",
) -> CompiledMetaStep:
    """Compile `mwnet_step`; model, weight net, gradients, buffers and random state are left unchanged.

    G(l; phi) = sum_n w_n l_n / S,  theta^ = theta - update(sum_n c_n g_n),  s_n = <g_n(theta), v>
    d meta_loss(theta^)/dphi = - sum_n s_n dc_n/dphi;  .grad = sum_n w_n g_n / S with the new phi

    Both optimizers step uncompiled, so any may be used, and their learning rates may change, as may that of the virtual
    step if virtual_lr is None. Otherwise as for `compile_step`: shapes, and the numbers and functions that the step
    reads, are fixed by this call.

    Args:
        batch, meta_batch: tuples, lists or dicts of tensors; the compiled step takes others of the same shapes.
        features: tensors are passed again in every step; a function is called in every step, and must keep no state.
        virtual: "sgd", "momentum" or "nesterov".
        backend: as for `torch.compile`.
        Others: as for `mwnet_step`.
    Returns: `CompiledMetaStep`, called as `step(batch, meta_batch, features=None) -> MetaStepResult`.
    Raises:
        NotImplementedError: as for `compile_step`, and for other virtual steps; `mwnet_step` handles all of these.
        ValueError: the virtual step reads momentum that does not exist yet; let the optimizer step once before.
        Otherwise as `mwnet_step`.
    """
    require_weight_net(weight_net, weight_optimizer, normalise, model)
    problem = pose(model, batch, meta_batch, loss_fn, params, "reuse", allow_unused=allow_unused)
    rule = compilable_rule(problem, virtual, virtual_lr, optimizer, "mwnet_step")
    asked = features if are_asked_for(features) else None
    weighting = Weighting(weight_net, normalise, detach_losses)

    def halves(problem: Problem, others: Sequence[Any], rule: VirtualRule, engine: str) -> Iterator[PartResult]:
        given = Features(*others)
        start = RestorePoint(problem.model, problem.writes)
        train, used, dots, meta_loss, gradient = meta_gradient(problem, start, weighting, given, rule, engine)
        yield PartResult(used, [dots, meta_loss], gradient, more=True)
        weights = weighting.weights(train.losses, given.values)
        yield PartResult(used, [weights, train.losses], train.weighted_gradient(weights))

    uncompiled = partial(
        mwnet_step,
        model,
        weight_net,
        weight_optimizer=weight_optimizer,
        virtual_lr=virtual_lr,
        normalise=normalise,
        detach_losses=detach_losses,
        virtual=virtual,
        loss_fn=loss_fn,
        optimizer=optimizer,
        engine=engine,
        params=params,
        allow_unused=allow_unused,
    )
    step = TwoParts(
        model,
        optimizer,
        network=weight_net,
        network_optimizer=weight_optimizer,
        rule=rule,
        loss_fn=loss_fn,
        params=params,
        allow_unused=allow_unused,
        features=asked,
        functions=[],
        halves=halves,
    )
    batches = OwnBatches(batch=batch, meta_batch=meta_batch, features=features if asked is None else None)
    return CompiledMetaStep(CompiledParts(step, batches, engine, compiler_of(backend)), uncompiled)
