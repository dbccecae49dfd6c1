"""Logit tangents: how all logits of a batch change with the parameters, from one forward-mode pass.

One pass gives n x C numbers, and from these the dots of any loss on the logits: <dl_n/dtheta, v> = <dl_n/dz_n, dz_n>.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.capture.host import finite_sum
from metakern.capture.losses import LossFunction, evaluate_losses, logits_in, output_for
from metakern.capture.state.gradients import gradients_aside
from metakern.capture.state.passes import PassState, unchanged_on_error
from metakern.engines import jvp, pose
from metakern.engines.problem import Problem

LogitsFunction = Callable[[nn.Module, Any], Tensor]


class LogitTangents(NamedTuple):
    """Every tensor is detached."""

    tangents: Tensor  # [n, C], dz_nk = d z_nk/dtheta . v
    logits: Tensor  # [n, C]
    meta_loss: Tensor  # []


class LogitPass:
    """A forward pass of the train batch that keeps the graph of its logits, and can compute their tangents."""

    def __init__(self, problem: Problem, logits_fn: LogitsFunction | None) -> None:
        self._problem = replace(problem, loss_fn=logits_fn or batch_logits)
        problem.writes.keep_functions(problem.loss_fn, logits_fn)
        self._start = PassState(problem.model, self._problem.loss_fn, problem.writes)
        # In the form of the dual pass, so that dropout masks are the same.
        with jvp.first_pass(problem) as self._products, problem.writes.watching():
            self.logits = evaluate_losses(problem.model, problem.batch, self._problem.loss_fn, "batch")
        _require_logits(self.logits)
        jvp.require_forward_mode(self._problem, self.logits, self._start, self._products)

    def tangents(self, direction: Mapping[str, Tensor]) -> Tensor:
        """dz/dtheta . V, [n, C], with the random numbers and running statistics of the first pass."""
        return jvp.loss_tangents(self._problem, dict(direction), self._start, self.logits.detach(), self._products)


def batch_logits(model: nn.Module, batch: Any) -> Tensor:
    """Logits of `(inputs, targets)`, or of a mapping, passed to the model as keywords without its "labels"."""
    if isinstance(batch, Mapping):
        return logits_in(output_for(model, {key: value for key, value in batch.items() if key != "labels"}))
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return logits_in(output_for(model, batch[0]))
    raise TypeError(
        f"batch must be (inputs, targets) or a mapping with 'labels', or come with a logits_fn(model, batch); got "
        f"{type(batch).__name__}"
    )


def logit_tangents(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    loss_fn: LossFunction | None = None,
    logits_fn: LogitsFunction | None = None,
    params: Any = None,
    allow_unused: bool = False,
) -> LogitTangents:
    """Derivative of every logit of a batch along the meta gradient, in one forward-mode pass; changes nothing.

    dz_nk = < dz_nk/dtheta, (1/m) sum_j dl'_j/dtheta >

    Hence dots_n = <dl_n/dz_n, dz_n> for any loss on the logits, and for a soft label p_nk, with q = softmax(z),
    <d log q_nk/dtheta, g_meta> = dz_nk - sum_j q_nj dz_nj.

    Args:
        model, batch, meta_batch, params, allow_unused: as for `l2rw_step`.
        loss_fn: the loss of the meta batch, `loss_fn(model, meta_batch) -> losses [m]`; default: cross entropy.
        logits_fn: `logits_fn(model, batch) -> logits [n, C]`; default: the model's output or its `.logits`.

    Returns: `LogitTangents(tangents [n, C], logits [n, C], meta_loss [])`.

    Raises: as `l2rw_step`; NotImplementedError if an operation of the model has no forward mode.

    Source: the n x C dot products are those of Zheng et al., Meta Label Correction for Noisy Label Learning, AAAI 2021,
        equations 3 to 8; to take them from one forward-mode pass is metakern's own.
    """
    problem = pose(model, batch, meta_batch, loss_fn, params, "reuse", allow_unused=allow_unused)
    aside = gradients_aside(problem.trainable.values())
    with unchanged_on_error(model, problem.writes), aside, PassState(model, loss_fn, problem.writes).replayed():
        meta_loss, direction = problem.meta_gradient()
        given = LogitPass(problem, logits_fn)
        problem.require_reached(given.logits)
        tangents = given.tangents(direction)
    return LogitTangents(tangents, given.logits.detach(), meta_loss)


def _require_logits(logits: Any) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() != 2:
        got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"batch: expected logits of shape [n, C] from the model, got {got}; pass logits_fn")
    if not finite_sum(logits):
        bad = (~torch.isfinite(logits.detach()).all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"batch: the logits of examples {bad[:10]} are not finite; nothing was changed")
