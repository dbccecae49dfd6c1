"""The small network that a step trains along with the model: its requirements, its step, and undoing a failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metakern.capture.losses import LossFunction, losses_of
from metakern.capture.members import parameters_of
from metakern.capture.state.passes import unchanged_on_error
from metakern.engines.problem import Problem
from metakern.step.hand_over import separate


def require_meta_network(network: Any, optimizer: Any, argument: str, optimizer_argument: str, model: Any) -> None:
    """Raise unless `network` is a module with trainable parameters that it does not share with the model, and
    `optimizer` is None or an optimizer of it.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"{argument} must be a torch.nn.Module, got {type(network).__name__}")
    trainable = {id(p) for p in network.parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"{argument} has no parameter with requires_grad=True; there is nothing to learn")
    if isinstance(model, nn.Module) and not trainable.isdisjoint(map(id, parameters_of(model))):
        shared = next(name for name, p in model.named_parameters() if id(p) in trainable)
        raise ValueError(
            f"{argument} shares parameter '{shared}' with the model, and the gradient of each would ignore the other; "
            f"give {argument} a copy of it (copy.deepcopy), or freeze it with requires_grad_(False)"
        )
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{optimizer_argument} must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & trainable:
        raise ValueError(f"{optimizer_argument} holds none of the trainable parameters of {argument}")


def are_asked_for(features: Any) -> bool:
    """Whether `features` is a function of model and batch."""
    return callable(features) and not isinstance(features, Tensor)


def features_of(features: Any) -> tuple[Any, ...]:
    """A tensor or a tuple as extra arguments, detached."""
    if features is None:
        return ()
    given = tuple(features) if isinstance(features, (tuple, list)) else (features,)
    return tuple(f.detach() if isinstance(f, Tensor) else f for f in given)


class Features:
    """Extra arguments of a meta network for the train batch of one step.

    A user's function may read what forward hooks kept, so it is called right after the first forward pass of the batch:
    later passes (forward mode, a probe for interacting examples) would have overwritten that.
    """

    def __init__(self, features: Any) -> None:
        self._features = features
        self._asked = are_asked_for(features)
        self.values: tuple[Any, ...] = () if self._asked else features_of(features)

    def listening(self, problem: Problem) -> Problem:
        """The problem with a loss function that computes the features when it is first called."""
        return replace(problem, loss_fn=_Listening(self, problem.loss_fn)) if self._asked else problem

    def hear(self, model: nn.Module, batch: Any) -> None:
        if self._asked:
            self._asked = False
            with torch.no_grad():
                self.values = features_of(self._features(model, batch))


class _Listening:
    """A loss function that also computes the features; its `__code__` is that of the given one, for inspection."""

    def __init__(self, features: Features, loss_fn: LossFunction | None) -> None:
        self._features, self._loss_fn = features, loss_fn
        self.__code__ = getattr(loss_fn, "__code__", None) or type(loss_fn)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        losses = losses_of(model, batch, self._loss_fn, "batch")
        self._features.hear(model, batch)
        return losses


def ask(network: nn.Module, first: Tensor, features: tuple[Any, ...]) -> Any:
    """network(first, *features) in the network's own precision, also under autocast.

    Its gradient is a sum with cancellation, and the network is small: half precision would save nothing and could get
    the sign wrong.
    """
    own = next((p.dtype for p in network.parameters() if p.is_floating_point()), None)

    def cast(value: Any) -> Any:
        return value.to(own) if isinstance(value, Tensor) and value.is_floating_point() and own is not None else value

    with torch.autocast(first.device.type, enabled=False):
        return network(cast(first), *map(cast, features))


def gradient_of(network: nn.Module, surrogate: Tensor) -> dict[nn.Parameter, Tensor]:
    """d surrogate/dphi, for the parameters that the surrogate depends on."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(surrogate, parameters, allow_unused=True)
    return {p: g for p, g in zip(parameters, found, strict=True) if g is not None}


def step_meta_network(
    network: nn.Module, optimizer: torch.optim.Optimizer | None, gradient: dict[nn.Parameter, Tensor]
) -> None:
    """Replace `.grad` of every parameter, and step the optimizer if there is one."""
    own = separate(gradient, {p: p for p in gradient})
    for p in network.parameters():
        p.grad = own.get(p)  # None where it is frozen: the optimizer would move it by the gradient of an earlier step
    if optimizer is not None:
        optimizer.step()


@contextmanager
def undone_on_error(network: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Parameters, buffers, gradients, and what the optimizer keeps in its state and groups, are as before if an
    exception leaves the block.

    Everything is copied, so this is for networks that are small compared with the model.
    """
    values = [(p, p.detach().clone()) for p in network.parameters()]
    held = [] if optimizer is None else _held(optimizer)
    with unchanged_on_error(network):
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for p, value in values:
                    p.copy_(value)
            for kept, before in held:
                kept.clear()
                kept.update(before)
            raise


def _held(optimizer: torch.optim.Optimizer) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """The state and the groups of an optimizer, some of which keep counters there, each with a copy."""
    copies: list[tuple[dict[Any, Any], dict[Any, Any]]] = [(optimizer.state, _copied(optimizer.state))]
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        copies.append((group, {"params": group["params"], **_copied(settings)}))
    return copies


def _copied(held: dict[Any, Any]) -> dict[Any, Any]:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, dict(held))
