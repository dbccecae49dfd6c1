"""Forward mode of functions that define a backward pass alone: custom autograd.Functions, operators of extensions.

A backward pass u -> J^T u is linear in u, so that J t = d<J^T u, t>/du, by two backward passes through that function
alone. That is the derivative that the gradient takes, also where it is none of what the function computes:
straight-through estimators, surrogate gradients of spikes, gradient reversal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from metakern.capture.host import host_may_wait, is_traced
from metakern.layers.dual import is_dual


@contextmanager
def custom_functions_forward() -> Iterator[None]:
    """Inside the block custom functions without a `jvp` take dual tensors."""

    def apply(cls: Any, *args: Any) -> Any:
        plain = super(_SingleLevelFunction, cls).apply
        if cls.jvp is not _SingleLevelFunction.jvp or not any(map(is_dual, args)):
            return plain(*args)
        return through_backward(plain, args, {}, cls.__name__)

    # Beneath `Function.apply`, which modules keep under names of their own (`rounded = Rounded.apply`).
    _SingleLevelFunction.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del _SingleLevelFunction.apply  # type: ignore[attr-defined]


def through_backward(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    """What `function` returns of dual tensors, its tangents by two backward passes.

    Raises: NotImplementedError: its backward pass cannot be differentiated, is not linear, or loses what it was given.
    """
    given, form = tree_flatten((tuple(args), kwargs))
    with torch._C.DisableTorchFunction():  # what stands for a parameter says that it is trainable
        in_graph = any(isinstance(value, Tensor) and value.requires_grad for value in given)
    if in_graph:
        raise _refusal(name, "not where a gradient of its inputs is taken as well")
    duals = [k for k, value in enumerate(given) if is_dual(value)]
    tangents = []
    for k in duals:
        given[k], tangent = forward_ad.unpack_dual(given[k])
        given[k] = given[k].detach().requires_grad_()
        tangents.append(tangent)
    leaves = [given[k] for k in duals]
    args, kwargs = tree_unflatten(given, form)
    try:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(False):
            output = function(*args, **kwargs)
            kept = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            found = iter(_along(kept, leaves, tangents))
    except RuntimeError as error:
        raise _refusal(name, str(error).splitlines()[0]) from error
    except _Lost as lost:
        raise _refusal(name, str(lost)) from None
    outputs, form = tree_flatten(output)
    differentiable = set(map(id, kept))
    return tree_unflatten(
        [forward_ad.make_dual(t.detach(), next(found)) if id(t) in differentiable else t for t in outputs], form
    )


class _Lost(Exception):
    """Why two backward passes do not give J t."""


def _refusal(name: str, reason: str) -> NotImplementedError:
    return NotImplementedError(f"{name} has no forward mode of its own (jvp), and by its backward pass: {reason}")


def _along(outputs: list[Tensor], inputs: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    """J t for every output."""
    if not outputs:
        return []
    # Any but zeros would do; uneven, so that what is not linear shows.
    u = [torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in outputs]
    u = [each.requires_grad_() for each in u]
    back = torch.autograd.grad(outputs, inputs, u, create_graph=True, allow_unused=True)
    terms = [(g, t) for g, t in zip(back, tangents) if g is not None]
    if any(not g.requires_grad and not _may_be_zero(g) for g, _ in terms):
        raise _Lost("what it returns does not depend, for autograd, on the gradient that it was given")
    whole = sum([(g * t.to(g.dtype)).sum() for g, t in terms if g.requires_grad])
    if not isinstance(whole, Tensor):
        return [torch.zeros_like(o) for o in outputs]
    found = torch.autograd.grad(whole, u, retain_graph=True, allow_unused=True, materialize_grads=True)
    if host_may_wait() and not is_traced():  # a step is taken before it is traced
        _require_linear(outputs, inputs, u, back)
        _require_whole(whole, u, found, sum([g.detach().norm() * t.norm() for g, t in terms]))
    return [tangent.detach() for tangent in found]


def _may_be_zero(gradient: Tensor) -> bool:
    return is_traced() or not host_may_wait() or not gradient.any()


def _require_linear(
    outputs: list[Tensor], inputs: list[Tensor], u: list[Tensor], back: Sequence[Tensor | None]
) -> None:
    """Raise unless larger gradients come back larger by as much: what clips or normalises them is no derivative."""
    scale = 16.0 if any(each.dtype == torch.float16 for each in u) else 2.0**24
    more = [each.detach() * scale for each in u]
    scaled = torch.autograd.grad(outputs, inputs, more, retain_graph=True, allow_unused=True)
    for before, after in zip(back, scaled):
        if before is not None and after is not None:
            apart = (after / scale - before.detach()).norm()
            if not apart <= _rounding(u) * before.detach().norm():
                raise _Lost("gradients that are larger by a factor do not come back larger by it")


@torch.no_grad()
def _require_whole(whole: Tensor, u: list[Tensor], found: Sequence[Tensor], size: Tensor | float) -> None:
    """Raise unless <u, J t> is <J^T u, t>: the derivative by u is then of all that came back."""
    apart = whole - sum([(a * b).sum() for a, b in zip(u, found)])
    if not bool(apart.abs() <= _rounding(u) * size):
        raise _Lost("it loses a part of the gradient that it was given, or adds to it")


def _rounding(u: list[Tensor]) -> float:
    """The share of sums by which passes differ that differ by rounding alone."""
    return max(torch.finfo(each.dtype).eps for each in u) ** 0.5
