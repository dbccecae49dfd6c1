"""Give a gradient to the parameters and, if there is one, let a torch optimizer step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from metakern.capture.members import parameters_of
from metakern.weighted_grad import added

K = TypeVar("K", bound=Hashable)


def require_optimizer(optimizer: torch.optim.Optimizer | None, trainable: Mapping[str, nn.Parameter]) -> None:
    """Raise unless `optimizer` is None or a torch optimizer of at least one trainable parameter of the model."""
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer: LBFGS evaluates a closure several times a step; leave it out, and step from .grad")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in trainable.values()):
        raise ValueError("optimizer holds none of the model's trainable parameters; build it from model.parameters()")


def hand_over(
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    gradient: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    accumulate: bool,
) -> None:
    """Leave `gradient` in `.grad`, replacing or adding to what is there, and step if there is an optimizer.

    Parameters that it does not name have no gradient afterwards, nor have frozen ones and others of the optimizer: an
    earlier gradient would move them. With `accumulate`, they keep what they had.

    If the optimizer or one of its hooks raises, `.grad` is restored. Parameters and state that the optimizer updated
    before are not: that would take a copy of all of them at every step.
    """
    own, others = separate(gradient, trainable), [] if accumulate else stale(model, trainable, optimizer)
    before = {p: p.grad for p in (*trainable.values(), *others)}
    for p in others:
        p.grad = None
    for name, p in trainable.items():
        if not accumulate or p.grad is None:
            p.grad = own.get(name)
        elif name in own:
            p.grad = added(p.grad, own[name])
    if optimizer is not None:
        try:
            optimizer.step()
        except BaseException:
            for p, grad in before.items():
                p.grad = grad
            raise
    if accumulate:
        for p, earlier in before.items():
            _add_in_place(p, earlier)


def _add_in_place(p: Tensor, earlier: Tensor | None) -> None:
    """Move the sum into the memory of the earlier gradient, as a backward pass would: it may be part of a buffer that
    holds all of them. Not before nothing can fail any more.
    """
    if earlier is None or p.grad is None or p.grad is earlier or earlier.requires_grad:
        return
    if earlier.layout is p.grad.layout is torch.strided and earlier.stride() == p.stride():
        p.grad = earlier.copy_(p.grad)


def stale(
    model: nn.Module, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> list[Tensor]:
    """Parameters with a gradient from an earlier backward pass that no step replaces: frozen ones, and others of the
    optimizer.
    """
    own = {id(p) for p in trainable.values()}
    frozen = [p for p in parameters_of(model) if not p.requires_grad and p.grad is not None]
    held = () if optimizer is None else (p for group in optimizer.param_groups for p in group["params"])
    return [*frozen, *(p for p in held if p.grad is not None and id(p) not in own)]


def separate(gradient: Mapping[K, Tensor], parameters: Mapping[K, nn.Parameter]) -> dict[K, Tensor]:
    """Every gradient in its own memory, with the strides of its parameter, as a backward pass would leave it.

    The gradients of a + b in a and b are one tensor, which clipping in place would scale twice; that of a.sum() is one
    number, expanded; and fused optimizers walk through gradient and parameter memory in parallel.
    """
    places: set[int] = set()
    found = {}
    for name, grad in gradient.items():
        if grad.layout is torch.strided:
            if grad.stride() != parameters[name].stride() or grad.data_ptr() in places:
                grad = torch.empty_like(parameters[name], requires_grad=False).copy_(grad)
            places.add(grad.data_ptr())
        found[name] = grad
    return found
