"""A whole step of meta label correction as two compiled programs; the label net's optimizer steps in between.

    step = compile_mlc_step(model, label_net, batch, meta_batch, label_optimizer=..., virtual_lr=0.1)
    for batch, meta_batch in loader:
        result = step(batch, meta_batch)

The second computes the gradient for the new labels, or returns that of the virtual step if it is also the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.losses import LossFunction
from metakern.engines import pose
from metakern.engines.problem import Problem
from metakern.step.logit_tangents import LogitsFunction
from metakern.step.meta_network import are_asked_for, require_meta_network, step_meta_network
from metakern.step.mlc import Carry, Corrected, CorrectionResult, label_gradient, mlc_step, require_carry, with_carry
from metakern.step.programs.compilable import PartResult
from metakern.step.programs.own_batches import OwnBatches
from metakern.step.programs.program import Backend, compiler_of
from metakern.step.programs.step_program import NotThisProgram
from metakern.step.programs.two_parts import CompiledParts, TwoParts, compilable_rule
from metakern.step.virtual import VirtualRule


class CompiledCorrectionStep:
    """The step that `compile_mlc_step` compiled; call it with batches of the compiled shapes and dtypes."""

    def __init__(
        self,
        programs: Mapping[bool, CompiledParts],
        label_net: nn.Module,
        label_optimizer: torch.optim.Optimizer | None,
        uncompiled: Callable[..., CorrectionResult],
    ) -> None:
        self._programs = programs  # by whether the label net steps; if there is only one, steps carry nothing
        self._label_net, self._label_optimizer, self._uncompiled = label_net, label_optimizer, uncompiled

    def __call__(
        self,
        batch: Any,
        meta_batch: Any,
        features: Any = None,
        clean_batch: Any = None,
        *,
        step_label_net: bool = True,
        carry: Carry | None = None,
        accumulate: bool = False,
    ) -> CorrectionResult:
        """One step on new batches and features, as `mlc_step` would take it.

        If they have other shapes than the compiled ones, or take another branch of the code (as labels that are not
        distributions do), the step runs uncompiled.

        Args:
            batch, meta_batch, clean_batch: n, m and k examples, in the form of the compiled ones.
            features: tensors as those given to `compile_mlc_step`; None if it was given a function, or none.
            step_label_net, carry: as for `mlc_step`; they need a step compiled with carries=True.
            accumulate: add to `.grad` of the model instead of replacing it.

        Returns: `CorrectionResult(labels [n, C], tangents [n, C], losses [n], meta_loss [], carry, engine)`, with
            meta_loss at theta^.

        Raises: ValueError if a batch differs from the compiled one in more than shapes and tensor values, if anything
            that the step reads has changed in more than tensor values, or if a step compiled without carries=True is
            asked to carry; otherwise as `mlc_step`.
        """
        if len(self._programs) == 1 and (carry is not None or not step_label_net):
            what = "step_label_net=False" if carry is None else "carry"
            raise ValueError(f"{what}: this step was compiled to carry nothing; compile it with carries=True")
        require_carry(carry, self._label_net)
        parts, learnt = self._programs[step_label_net], dict[nn.Parameter, Tensor]()

        def learn(found: list[Tensor], gradient: dict[nn.Parameter, Tensor]) -> None:
            learnt.update(gradient if carry is None else with_carry(gradient, carry, gamma=found[-1]))
            if step_label_net:
                step_meta_network(self._label_net, self._label_optimizer, learnt)

        try:
            first, second = parts.take(batch, meta_batch, features, clean_batch, learn=learn, accumulate=accumulate)
        except NotThisProgram:
            batch, meta_batch, features, clean_batch = parts.given()
            return self._uncompiled(
                batch,
                meta_batch,
                features=features,
                clean_batch=clean_batch,
                step_label_net=step_label_net,
                carry=carry,
                accumulate=accumulate,
            )
        (tangents, meta_loss, *_), (labels, losses) = first, second
        held = None if step_label_net else learnt
        return CorrectionResult(labels, tangents, losses, meta_loss, held, parts.engine)


def compile_mlc_step(
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
    carries: bool = False,
    loss_fn: LossFunction | None = None,
    logits_fn: LogitsFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    params: Any = None,
    allow_unused: bool = False,
    backend: str | Backend = "inductor",
) -> CompiledCorrectionStep:
    """Compile `mlc_step`; model, label net, gradients, buffers and random state are left unchanged.

    p_n = label_net(y_n, features_n; phi),  l_n = - sum_k p_nk log q_nk,  L = (sum_n l_n + sum_i l_i) / (n + k)
    theta^ = theta - update(dL/dtheta),  d meta_loss(theta^)/dphi = 1/(n + k) sum_nk <d log q_nk/dtheta, v> dp_nk/dphi
    .grad = dL/dtheta with the labels of the new phi, or with those of the old one if `fused`

    Both optimizers step uncompiled, so any may be used, and their learning rates may change, as may that of the virtual
    step if virtual_lr is None. Otherwise as for `compile_step`: shapes, and the numbers and functions that the step
    reads, are fixed by this call.

    Args:
        batch, meta_batch, clean_batch: tuples, lists or dicts of tensors; the compiled step takes others of the same
            shapes.
        features: tensors are passed again in every step; a function is called in every step, and must keep no state.
        virtual: "sgd", "momentum" or "nesterov".
        carries: whether the label net may step every K steps: the compiled step then accepts `step_label_net=False` and
            `carry`. Each step then computes gamma, with one more pass over the meta batch; and unless `fused`, steps in
            which the label net does not step are compiled separately.
        backend: as for `torch.compile`.
        Others: as for `mlc_step`.
    Returns: `CompiledCorrectionStep`, called as `step(batch, meta_batch, features=None, clean_batch=None) ->
        CorrectionResult`.
    Raises:
        NotImplementedError: as for `compile_step`, and for other virtual steps; `mlc_step` handles all of these.
        ValueError: the virtual step reads momentum that does not exist yet; let the optimizer step once before.
        Otherwise as `mlc_step`.

    Source: Zheng et al., Meta Label Correction for Noisy Label Learning, AAAI 2021, equations 3 to 8.
    """
    require_meta_network(label_net, label_optimizer, "label_net", "label_optimizer", model)
    problem = pose(model, batch, meta_batch, loss_fn, params, "reuse", allow_unused=allow_unused)
    rule = compilable_rule(problem, virtual, virtual_lr, optimizer, "mlc_step")
    asked = features if are_asked_for(features) else None
    batches = OwnBatches(
        batch=batch, meta_batch=meta_batch, features=features if asked is None else None, clean_batch=clean_batch
    )

    def program(again: bool) -> CompiledParts:
        def halves(problem: Problem, others: Sequence[Any], rule: VirtualRule, engine: str) -> Iterator[PartResult]:
            train = Corrected(problem, label_net, logits_fn, *others)
            found = label_gradient(problem, train, rule, again=again, carried=carries)
            gamma = [] if found.gamma is None else [found.gamma]
            yield PartResult(engine, [found.tangents, found.meta_loss, *gamma], found.gradient, more=True)
            labels, gradient = train.corrected() if again else (found.labels, found.virtual)
            yield PartResult(engine, [labels, train.losses(labels).detach()], gradient)

        step = TwoParts(
            model,
            optimizer,
            network=label_net,
            network_optimizer=label_optimizer,
            rule=rule,
            loss_fn=loss_fn,
            params=params,
            allow_unused=allow_unused,
            features=asked,
            functions=[logits_fn],
            halves=halves,
        )
        return CompiledParts(step, batches, "jvp", compiler_of(backend))

    programs = {True: program(again=not fused)}
    if carries:
        programs[False] = programs[True] if fused else program(again=False)
    uncompiled = partial(
        mlc_step,
        model,
        label_net,
        label_optimizer=label_optimizer,
        virtual_lr=virtual_lr,
        virtual=virtual,
        fused=fused,
        loss_fn=loss_fn,
        logits_fn=logits_fn,
        optimizer=optimizer,
        params=params,
        allow_unused=allow_unused,
    )
    return CompiledCorrectionStep(programs, label_net, label_optimizer, uncompiled)
