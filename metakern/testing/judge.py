"""Run a step and compare everything it returned and left behind with the oracle."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metakern.testing import budget
from metakern.testing.catalogue.case import Setup
from metakern.testing.oracle import Oracle, clip_normalise


@dataclass(frozen=True)
class Judgement:
    """What the step returned, and the shares of the error budgets that it used."""

    result: Any
    dots_share: float
    gradient_share: float


def judge_step(
    step: Callable[..., Any], setup: Setup, *, truth: Oracle | None = None, plain: Oracle | None = None, **keywords: Any
) -> Judgement:
    """Call `step` on `setup` and assert dots, weights, losses, meta loss and `.grad`; the model must be left as it was.

    `plain` is the oracle's loop in the working dtype: needed unless the model is in float64.
    """
    truth = truth or setup.oracle()
    before = Snapshot.of(setup.model)
    result = step(setup.model, setup.batch, setup.meta_batch, loss_fn=setup.loss_fn, **keywords)
    dots_share = budget.assert_dots(result.dots, truth, plain=plain)
    budget.assert_within(result.weights, clip_normalise(result.dots), 1.0, name="weights")
    budget.assert_within(result.losses, truth.losses, 1 + truth.losses.abs(), terms=1000, name="losses")
    budget.assert_within(result.meta_loss, truth.meta_loss, 1 + truth.meta_loss.abs(), terms=1000, name="meta_loss")
    gradient_share = budget.assert_gradient(gradients(setup.model), truth, weights=result.weights, plain=plain)
    before.assert_unchanged(setup.model, grads=False, buffers=not setup.interacting)
    return Judgement(result, dots_share, gradient_share)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """`.grad` of every trainable parameter, by name."""
    return {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Snapshot:
    """Everything about a model and the process that a failed call must leave alone."""

    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    modes: dict[str, bool]
    attributes: dict[str, set[str]]
    hooks: dict[str, list[dict[int, Any]]]
    random_state: Tensor
    optimizer: Mapping[str, Any] | None

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> "Snapshot":
        modules = dict(model.named_modules())
        return cls(
            parameters={name: param.detach().clone() for name, param in model.named_parameters()},
            gradients={
                name: None if param.grad is None else param.grad.clone() for name, param in model.named_parameters()
            },
            buffers={name: buffer.clone() for name, buffer in model.named_buffers()},
            modes={name: module.training for name, module in modules.items()},
            attributes={name: set(vars(module)) for name, module in modules.items()},
            hooks={name: [dict(getattr(module, kind)) for kind in _HOOKS] for name, module in modules.items()},
            random_state=torch.get_rng_state(),
            optimizer=None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
        )

    def assert_unchanged(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        grads: bool = True,
        buffers: bool = True,
        random: bool = True,
    ) -> None:
        now = Snapshot.of(model, optimizer)
        changed = [
            kind
            for kind, same in {
                "parameters": _equal(self.parameters, now.parameters),
                "gradients": not grads or _equal(self.gradients, now.gradients),
                "buffers": not buffers or _equal(self.buffers, now.buffers),
                "training modes": self.modes == now.modes,
                "module attributes": self.attributes == now.attributes,
                "hooks": self.hooks == now.hooks,
                "random state": not random or torch.equal(self.random_state, now.random_state),
                "optimizer state": _equal(self.optimizer, now.optimizer),
            }.items()
            if not same
        ]
        assert not changed, f"the call changed {', '.join(changed)}"


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        left, right = left.to_dense(), right.to_dense()
        return left.shape == right.shape and bool(((left == right) | (left.isnan() & right.isnan())).all())
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left == right
