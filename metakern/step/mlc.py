"""Label correction: a small network that proposes a soft label for every example, trained on a clean meta batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.capture.host import host_may_wait
from metakern.capture.losses import LossFunction, per_example_losses
from metakern.capture.state.gradients import gradients_aside
from metakern.capture.state.passes import unchanged_on_error
from metakern.engines import pose
from metakern.engines.jvp import PLAIN_ATTENTION
from metakern.engines.problem import Problem
from metakern.engines.repetition import agree
from metakern.engines.weighted_backward import weighted_backward
from metakern.step.finite import require_finite
from metakern.step.hand_over import hand_over, require_optimizer
from metakern.step.logit_tangents import LogitPass, LogitsFunction
from metakern.step.meta_network import (
    Features,
    ask,
    gradient_of,
    require_meta_network,
    step_meta_network,
    undone_on_error,
)
from metakern.step.meta_pass import meta_gradient_at
from metakern.step.virtual import VirtualRule, VirtualStep
from metakern.weighted_grad import added

Carry = Mapping[nn.Parameter, Tensor]


class CorrectionResult(NamedTuple):
    """Outcome of a step on corrected labels; every tensor is detached."""

    labels: Tensor  # [n, C], the soft labels that the model's gradient was computed with
    tangents: Tensor  # [n, C], <d log q_nk/dtheta, v>: how label k of example n affects the meta loss
    losses: Tensor  # [n], cross entropy with those labels, before the step
    meta_loss: Tensor  # [], mean over the meta batch after the virtual step
    carry: Carry | None  # accumulated gradient of the label net, for the next call; None once it has stepped
    engine: str  # "jvp"


def mlc_step(
    model: nn.Module,
    label_net: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    label_optimizer: torch.optim.Optimizer | None,
    virtual_lr: float | None,
    features: Any = None,
    clean_batch: Any = None,
    virtual: str = "sgd",
    fused: bool = False,
    step_label_net: bool = True,
    carry: Carry | None = None,
    loss_fn: LossFunction | None = None,
    logits_fn: LogitsFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    params: Any = None,
    accumulate: bool = False,
    allow_unused: bool = False,
) -> CorrectionResult:
    """One step of meta label correction: virtual step on proposed labels, step of the label net, real step.

    p_n = label_net(y_n, features_n; phi),  l_n = - sum_k p_nk log q_nk,  L = (sum_n l_n + sum_i l_i) / (n + k)
    theta^ = theta - update(dL/dtheta),  v = (d update/d gradient) g_meta(theta^)
    d meta_loss(theta^)/dphi = 1/(n + k) sum_nk <d log q_nk/dtheta, v> dp_nk/dphi

    The n x C products come from one forward-mode pass. i runs over the k examples of `clean_batch`, which are trained
    on along with the corrected ones, and may be absent.

    Args:
        label_net: called as `label_net(targets [n], *features)`, returns label distributions [n, C].
        batch: `(inputs, targets)` or a mapping with "labels"; the targets are passed to the label net only.
        meta_batch, loss_fn: clean examples and their loss, as for `l2rw_step`; `clean_batch` uses the same loss.
        label_optimizer: steps with the meta-gradient; None leaves the meta-gradient in the label net's `.grad`.
        virtual_lr, virtual, params, features: as for `mwnet_step`.
        fused: the virtual step is also the real one, with the labels of the old phi: one backward pass fewer. Choose
            the `virtual` rule and learning rate of your optimizer, so that theta^ is where it steps to.
        step_label_net: False only adds the meta-gradient to `carry`, for label nets that step every K steps.
        carry: `carry` of the previous result. It is discounted by
            gamma = <(1 - J) g_meta(theta^), g_meta(theta)> / |g_meta(theta)|^2, J the diagonal d update/d gradient: the
            Hessian of L is taken to be the identity, which is the method's own approximation.
        logits_fn: as for `logit_tangents`.
        optimizer, accumulate, allow_unused: as for `l2rw_step`.

    Returns: `CorrectionResult(labels [n, C], tangents [n, C], losses [n], meta_loss [], carry, engine)`.

    Raises: as `l2rw_step`; ValueError if the label net does not return distributions. Model, label net and its
        optimizer are then unchanged.

    Source: Zheng et al., Meta Label Correction for Noisy Label Learning, AAAI 2021, equations 3 to 8.
    """
    require_meta_network(label_net, label_optimizer, "label_net", "label_optimizer", model)
    require_carry(carry, label_net)
    problem = pose(model, batch, meta_batch, loss_fn, params, "reuse", allow_unused=allow_unused)
    require_optimizer(optimizer, problem.trainable)
    rule = VirtualRule(virtual, virtual_lr, optimizer)
    rule.require_usable(problem.chosen)
    with unchanged_on_error(model, problem.writes), undone_on_error(label_net, label_optimizer):
        with gradients_aside(problem.trainable.values()):
            train = Corrected(problem, label_net, logits_fn, features, clean_batch)
            again = step_label_net and not fused
            found = label_gradient(problem, train, rule, again=again, carried=carry is not None)
            learnt = found.gradient
            if carry is not None and found.gamma is not None:
                learnt = with_carry(learnt, carry, found.gamma)
            if step_label_net:
                step_meta_network(label_net, label_optimizer, learnt)
            labels, gradient = train.corrected() if again else (found.labels, found.virtual)
        problem.writes.settle()
        hand_over(model, problem.trainable, gradient, optimizer, accumulate)
    held = None if step_label_net else learnt
    return CorrectionResult(labels, found.tangents, train.losses(labels).detach(), found.meta_loss, held, "jvp")


def _given_labels(batch: Any) -> Any:
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    got = f"a mapping with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise TypeError(f"batch must be (inputs, labels, ...) or a mapping with 'labels' for label_net to read; got {got}")


class Corrected:
    """The train pass: logits with their graph, the losses of any clean examples, and the label net."""

    def __init__(
        self, problem: Problem, label_net: nn.Module, logits_fn: LogitsFunction | None, features: Any, clean: Any
    ) -> None:
        self._problem, self.label_net = problem, label_net
        self._pass = LogitPass(problem, logits_fn)
        self._log_q = torch.log_softmax(self._pass.logits, 1)
        given = Features(features)
        given.hear(problem.model, problem.batch)
        self._features = given.values
        self.examples, self._clean = self._log_q.shape[0], dict[str, Tensor]()
        if clean is not None:
            with problem.writes.meta_pass(), PLAIN_ATTENTION():
                losses = per_example_losses(problem.model, clean, problem.loss_fn, "clean_batch")
                self.examples += losses.shape[0]
                self._clean = self._mean_gradient(losses)

    def propose(self) -> Tensor:
        """Soft labels, [n, C]."""
        labels = ask(self.label_net, _given_labels(self._problem.batch), self._features)
        if not isinstance(labels, Tensor) or labels.shape != self._log_q.shape:
            got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"label_net must return one distribution per example, shape {tuple(self._log_q.shape)}; got {got}"
            )
        _require_distributions(labels.detach())
        return labels

    def losses(self, labels: Tensor) -> Tensor:
        return -(labels.to(self._log_q.dtype) * self._log_q).sum(1)

    def gradient(self, labels: Tensor, last: bool) -> dict[str, Tensor]:
        """dL/dtheta for every trainable parameter, by name; the graph is kept except the `last` time."""
        found = self._mean_gradient(self.losses(labels), keep=not last)
        for name, g in self._clean.items():
            found[name] = added(found[name], g) if name in found else g
        self._problem.require_participation({id(self._problem.trainable[name]) for name in found})
        return found

    def corrected(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The labels of the current phi and dL/dtheta with them; the last gradient of this pass."""
        with torch.no_grad():
            labels = self.propose()
        return labels, self.gradient(labels, last=True)

    def _mean_gradient(self, losses: Tensor, keep: bool = False) -> dict[str, Tensor]:
        share = torch.full_like(losses, 1 / self.examples)
        return weighted_backward(self._problem, losses, share, keep, self._problem.trainable, PLAIN_ATTENTION)

    def log_tangents(self, direction: Mapping[str, Tensor]) -> Tensor:
        """<d log q_nk/dtheta, v> = dz_nk - sum_j q_nj dz_nj, [n, C]."""
        tangents = self._pass.tangents(direction)
        require_finite(tangents, self._problem)
        return tangents - (self._log_q.detach().exp() * tangents).sum(1, keepdim=True)


class LabelGradient(NamedTuple):
    """The gradient of the label net, with the labels and the gradient that the virtual step used."""

    labels: Tensor  # [n, C], of the present phi
    virtual: dict[str, Tensor]  # dL/dtheta with them; empty if the real step uses others
    tangents: Tensor  # [n, C]
    meta_loss: Tensor  # []
    gamma: Tensor | None  # [], how much of an older gradient survives, if one is carried
    gradient: dict[nn.Parameter, Tensor]  # d meta_loss(theta^)/dphi


def label_gradient(
    problem: Problem, train: Corrected, rule: VirtualRule, *, again: bool, carried: bool
) -> LabelGradient:
    """d meta_loss(theta^)/dphi = 1/(n + k) sum_nk <d log q_nk/dtheta, v> dp_nk/dphi.

    `again`: the gradient of new labels will be taken from the same train pass.
    """
    labels = train.propose()
    virtual = train.gradient(labels.detach(), last=not again)
    step = rule.step(problem.chosen, virtual)
    if again:
        virtual = {}  # as large as the model, and recomputed with the next labels
    meta_loss, meta_gradient = meta_gradient_at(problem, step.parameters)
    after = dict(meta_gradient) if carried else {}
    tangents = train.log_tangents(step.pulled_back(meta_gradient))
    gradient = gradient_of(train.label_net, (tangents.to(labels) * labels).sum() / train.examples)
    gamma = _discount(problem, step, after) if carried else None
    return LabelGradient(labels.detach(), virtual, tangents, meta_loss, gamma, gradient)


def _require_distributions(labels: Tensor) -> None:
    if not host_may_wait():
        return
    sums = labels.sum(1)
    wrong = (labels < 0).any(1) | ~agree(sums, torch.ones_like(sums))
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ValueError(
            f"label_net must return distributions, entries >= 0 that sum to 1; those of example {n} lie between "
            f"{float(labels[n].min()):.3g} and {float(labels[n].max()):.3g} and sum to {float(sums[n]):.3g}: end it "
            "with a softmax"
        )


def _discount(problem: Problem, step: VirtualStep, after: Mapping[str, Tensor]) -> Tensor:
    """gamma: how much of an older gradient of the label net survives this step of the model."""
    meta_loss, before = problem.meta_gradient()
    along, norm = torch.zeros_like(meta_loss), torch.zeros_like(meta_loss)
    for name, jacobian in step.jacobian.items():  # of the parameters that it moves
        if name in before:
            norm = norm + before[name].square().sum()
        if name in before and name in after:
            along = along + ((1 - jacobian) * after[name] * before[name]).sum()
    return along / (norm + (norm == 0))


def require_carry(carry: Any, label_net: nn.Module) -> None:
    """Raise unless it is what a previous step of this label net returned as `carry`."""
    expected = "the carry of a previous result, which maps parameters of label_net to tensors, or None"
    if carry is None:
        return
    if not isinstance(carry, Mapping):
        raise TypeError(f"carry must be {expected}; got {type(carry).__name__}")
    shapes = {p: p.shape for p in label_net.parameters()}
    for p, gradient in carry.items():
        if p not in shapes:
            got = f"a parameter {tuple(p.shape)} that label_net does not have" if isinstance(p, Tensor) else repr(p)
            raise ValueError(f"carry must be {expected}; one of its keys is {got}")
        if not isinstance(gradient, Tensor) or gradient.shape != shapes[p]:
            got = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            raise ValueError(f"carry must be {expected}; for a parameter {tuple(shapes[p])} it has {got}")


def with_carry(found: dict[nn.Parameter, Tensor], carry: Carry, gamma: Tensor) -> dict[nn.Parameter, Tensor]:
    """A gradient of the label net and gamma times an older one."""
    every = [*found, *(p for p in carry if p not in found)]
    return {
        p: found[p] + gamma * carry[p] if p in found and p in carry else found[p] if p in found else gamma * carry[p]
        for p in every
    }
