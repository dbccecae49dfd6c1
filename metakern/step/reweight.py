"""Dots, weights, weighted gradient, step: learning to re-weight examples, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.losses import LossFunction
from metakern.capture.state.buffers import unchanged_buffers
from metakern.capture.state.gradients import gradients_aside
from metakern.capture.state.passes import unchanged_on_error
from metakern.engines import pose
from metakern.engines.group import failing_together, sum_over_group, weights_over_group
from metakern.step.direction import Direction, solve_along, solve_pairwise
from metakern.step.finite import require_finite, require_finite_weights
from metakern.step.hand_over import hand_over, require_optimizer
from metakern.step.result import Dots, StepResult
from metakern.weights import apply_rule, weight_rule


def grad_dots(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    loss_fn: LossFunction | None = None,
    engine: str = "auto",
    params: Any = None,
    memory: str = "reuse",
    micro_batch: int | None = None,
    batchnorm: str = "exact",
    dot_precision: str = "same",
    allow_unused: bool = False,
    pairwise: bool = False,
) -> Dots:
    """Dot product of each example's gradient with the meta gradient. Changes nothing but the random state, and state
    that modules and loss functions keep outside parameters and buffers.

    dots_n = < dl_n/dtheta, (1/m) sum_j dl'_j/dtheta >
    dots_nj = < dl_n/dtheta, dl'_j/dtheta >, whose mean over j is dots_n, with `pairwise`

    Args:
        pairwise: dots with each meta example separately, [n, m]: which of them a step on the example helps or harms.
            Costs about one contraction with a direction per meta example on top of the two passes (forward mode and
            double backward: one pass each; memory="two_pass": one backward pass each). Cannot be combined with
            `micro_batch` or batchnorm="frozen"; a part of the batch gives the same rows, unless examples interact.
        Others: as for `l2rw_step`.
    Returns: `Dots` with dots [n] or [n, m], losses [n], meta_loss [] and the engine used.
    Raises: as `l2rw_step`.
    Source of the pairwise dots: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent, NeurIPS
        2020, section 3: multiplied by the learning rate and summed over checkpoints, they are TracInCP.
    """
    problem = pose(model, batch, meta_batch, loss_fn, params, memory, None, dot_precision, allow_unused)
    aside = gradients_aside(problem.trainable.values())
    with unchanged_on_error(model, problem.writes) as start, unchanged_buffers(model), aside:
        if pairwise:
            answer, used = solve_pairwise(problem, start, engine, micro_batch, batchnorm)
        else:
            answer, used = solve_along(problem, start, engine, None, micro_batch, batchnorm)
        require_finite(answer.dots.sum(1) if pairwise else answer.dots, problem)
        problem.writes.undo()
    return Dots(answer.dots, answer.losses, answer.meta_loss, used)


def reweight_step(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    rule: str | Callable[[Tensor], Tensor] = "clip_normalise",
    direction: Direction | None = None,
    loss_fn: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    engine: str = "auto",
    params: Any = None,
    accumulate: bool = False,
    memory: str = "reuse",
    micro_batch: int | None = None,
    batchnorm: str = "exact",
    dot_precision: str = "same",
    process_group: Any = None,
    allow_unused: bool = False,
) -> StepResult:
    """One re-weighted step with any rule from dots to weights.

    weights = rule(dots);  .grad = sum_n weights_n dl_n/dtheta

    Args:
        rule: "clip_normalise", "floor", "softmax", "unclipped", or a function from dots [n] to weights [n].
        direction: a function from the meta gradient, by parameter name, to the direction that the dots are taken with;
            `metakern.step.direction` has weight decay and preconditioning. None: the meta gradient itself.
        Others: as for `l2rw_step`.
    Returns: `StepResult`.
    Raises: as `l2rw_step`; ValueError if the rule does not return one weight per example.
    """
    function = weight_rule(rule)
    problem = pose(model, batch, meta_batch, loss_fn, params, memory, process_group, dot_precision, allow_unused)
    require_optimizer(optimizer, problem.trainable)
    with unchanged_on_error(model, problem.writes) as start:
        with gradients_aside(problem.trainable.values()), failing_together(process_group):
            answer, used = solve_along(problem, start, engine, direction, micro_batch, batchnorm)
            require_finite(answer.dots, problem)
            with torch.no_grad():
                weights = weights_over_group(lambda dots: apply_rule(function, dots), answer.dots, process_group)
            if not isinstance(rule, str):
                require_finite_weights(weights, problem)
            gradient = answer.weighted_gradient(weights)
        sum_over_group(gradient, process_group)
        problem.writes.settle()
        hand_over(model, problem.trainable, gradient, optimizer, accumulate)
    return StepResult(weights, answer.dots, answer.losses, answer.meta_loss, used)


def l2rw_step(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    loss_fn: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    engine: str = "auto",
    params: Any = None,
    accumulate: bool = False,
    memory: str = "reuse",
    micro_batch: int | None = None,
    batchnorm: str = "exact",
    dot_precision: str = "same",
    process_group: Any = None,
    allow_unused: bool = False,
) -> StepResult:
    """One step of learning to re-weight examples: keep what agrees with a small clean meta batch, drop the rest.

    dots_n = < dl_n/dtheta, (1/m) sum_j dl'_j/dtheta >
    weights_n = max(dots_n, 0) / (S + [S == 0]),  S = sum_n max(dots_n, 0)
    .grad = sum_n weights_n dl_n/dtheta

    This is the exact meta-gradient of the method at eps = 0, where the virtual step leaves theta unchanged and its
    learning rate cancels; nothing is differentiated twice.

    Args:
        model: any nn.Module, unmodified.
        batch: `(inputs, targets)`, a mapping with "labels" for `model(**batch)`, or anything that `loss_fn` accepts.
            The default loss is cross entropy per example (mean over the positions of an example).
        meta_batch: a batch of the same form; n and m may differ, and both may be 1.
        loss_fn: `loss_fn(model, batch) -> losses [n]`, one loss per example.
        optimizer: if given, it steps with the re-weighted gradient; otherwise the gradient is left in `.grad`, for you
            to clip, scale and step.
        engine: "auto" uses "ghost" where it is exact, and "jvp" where examples interact (batch statistics); "ghost",
            "jvp" and "double_backward" use that engine or raise an error.
        params: restrict the dots to parameters by name pattern, module or parameter; the gradient covers all of them.
        accumulate: add to `.grad` instead of replacing it.
        memory: "reuse" keeps inputs and output gradients of every layer and needs no second backward pass; "two_pass"
            keeps neither and runs one.
        micro_batch: process batch and meta batch this many examples at a time, so that memory does not grow with n:
            same weights and gradient, for one more forward and backward pass over the batch. Every tensor of a batch is
            split along dimension 0. Dropout masks are drawn part by part, and are the same for dots and gradient.
        batchnorm: "frozen" lets ghost handle BatchNorm in training mode by an approximation: dots and weights ignore
            that the statistics of the batch depend on its examples; losses, running statistics and the gradient for
            those weights stay exact. The result's engine is then "ghost_frozen". "exact" never approximates.
        dot_precision: "bf16", and on a GPU "tf32" or "fp8", lets ghost round the operands of the products behind the
            dots, which only determine the weights; the gradient for those weights is unaffected. "same" rounds nothing.
            If "auto" chooses another engine, its dots are exact. Effect and cost: docs/numerics.md.
        process_group: take V over the meta batches of all ranks of this torch.distributed group, normalise weights over
            their examples, and sum gradients; n and m may differ between ranks. The result, meta_loss included, is for
            this rank's own examples.
        allow_unused: accept trainable parameters that the losses of this batch do not depend on (an unused pooler, a
            dropped layer, an expert without tokens): they contribute nothing to the dots and are left without a
            gradient, as in a backward pass. Cannot be combined with `process_group`.

    Returns:
        `StepResult(weights [n], dots [n], losses [n], meta_loss [], engine)`.

    Raises:
        TypeError, ValueError: an argument is not as described, a loss is not finite, or a trainable parameter is
            unused. Model, gradients, buffers and random state are then as before the call. An error that the model or
            `loss_fn` raises comes through unchanged, with a note of which batch it was given.
        NotImplementedError: no exact engine supports the model; the message says why, and what to do.
        RuntimeError: another rank of `process_group` has raised.

    Source: Ren et al., Learning to Reweight Examples for Robust Deep Learning, ICML 2018, algorithm 1.
    """
    return reweight_step(
        model,
        batch,
        meta_batch,
        rule="clip_normalise",
        loss_fn=loss_fn,
        optimizer=optimizer,
        engine=engine,
        params=params,
        accumulate=accumulate,
        memory=memory,
        micro_batch=micro_batch,
        batchnorm=batchnorm,
        dot_precision=dot_precision,
        process_group=process_group,
        allow_unused=allow_unused,
    )
