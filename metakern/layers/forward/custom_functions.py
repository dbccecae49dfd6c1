"""Forward mode of functions that define only a backward pass: custom autograd.Functions, operators of extensions.

A backward pass u -> J^T u is linear in u, so that J t = d<J^T u, t>/du, by two backward passes through that function
alone. This is the derivative that the gradient uses, even if it is not that of what the function computes:
straight-through estimators, surrogate gradients of spikes, gradient reversal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import WeakSet

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.function import FunctionMeta, _is_setup_context_defined, _SingleLevelFunction
from torch.utils import checkpoint
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from metakern.capture.host import is_traced, may_look_at_values
from metakern.layers.forward.dual import is_dual

_NO_JVP = _SingleLevelFunction.jvp
_BY_OWN_JVP: WeakSet[Any] = WeakSet()
"""Functions whose backward pass could not be used; found in the step that runs before one is traced, not in tracing."""
_KEEPS_INPUTS = getattr(checkpoint, "_NoopSaveInputs", None)
"""The function by which checkpointed layers keep their inputs in torch 2.11; its output is empty."""


@contextmanager
def custom_functions_forward() -> Iterator[None]:
    """Inside the block, custom functions accept dual tensors, using their backward pass if it can be differentiated,
    otherwise their own `jvp`, and return constants under `torch.no_grad()`.

    Their `apply` belongs to torch's core, and modules keep it under other names (`rounded = Rounded.apply`). But every
    call looks up `forward` and then `jvp` on the class, and these are replaced.
    """
    found: list[list[Tensor | None]] = []  # tangents that `forward` found and `jvp` has not returned yet

    def looked_up(cls: Any, name: str) -> Any:
        value = type.__getattribute__(cls, name)
        if name == "forward":
            return _forward(cls, value, found)
        return _jvp(value, found) if name == "jvp" else value

    FunctionMeta.__getattribute__ = looked_up  # type: ignore[method-assign]
    try:
        yield
    finally:
        del FunctionMeta.__getattribute__


def _forward(cls: Any, plain: Callable[..., Any], found: list[list[Tensor | None]]) -> Callable[..., Any]:
    """The function's `forward`; called by `apply` with dual tensors, it calls `apply` again with plain ones."""

    @wraps(plain)  # its signature says what the arguments are
    def forward(*args: Any) -> Any:
        if forward_ad._is_fwd_grad_enabled():  # not called by `apply`, but as plain operations
            return plain(*args)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            duals = any(map(is_dual, args))
            if duals and cls is _KEEPS_INPUTS:
                output = plain(*args)
                found.append([torch.zeros_like(output)])
                return output
            if duals and not (is_traced() and cls in _BY_OWN_JVP):
                given = args if _is_setup_context_defined(cls.setup_context) else args[1:]
                try:
                    output, tangents = _along_backward(cls.apply, given, {}, cls.__name__)
                except NotImplementedError:
                    if type.__getattribute__(cls, "jvp") is _NO_JVP:
                        raise
                    _BY_OWN_JVP.add(cls)
                else:
                    found.append(tangents)
                    return output
        return plain(*args)

    return forward


def _jvp(own: Callable[..., Any], found: list[list[Tensor | None]]) -> Callable[..., Any]:
    """The tangents of the outputs: those that `forward` found, else by the function's own `jvp`."""

    def jvp(*args: Any) -> Any:
        tangents = found.pop() if found else own(*args)
        tangents = tuple(tangents) if isinstance(tangents, (tuple, list)) else (tangents,)
        if torch.is_grad_enabled():
            return tangents
        return tuple(None if t is None else torch.zeros_like(t) for t in tangents)

    return jvp


def through_backward(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    """What `function` returns for dual tensors, with tangents from two backward passes.

    Raises: NotImplementedError: its backward pass cannot be differentiated, is not linear, or loses what it was given.
    """
    output, tangents = _along_backward(function, args, kwargs, name)
    outputs, form = tree_flatten(output)
    duals = [t if tangent is None else forward_ad.make_dual(t, tangent) for t, tangent in zip(outputs, tangents)]
    return tree_unflatten(duals, form)


def _along_backward(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], name: str
) -> tuple[Any, list[Tensor | None]]:
    """What `function` returns, without tangents, and the tangents: one for each leaf, None if it has none.

    Raises: see `through_backward`.
    """
    given, form = tree_flatten((tuple(args), kwargs))
    with torch._C.DisableTorchFunction():  # replacements of parameters claim to require a gradient
        in_graph = any(isinstance(value, Tensor) and value.requires_grad for value in given)
    if in_graph:
        raise _refusal(name, "not if a gradient of its inputs is taken as well")
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
    return (
        tree_unflatten([t.detach() if id(t) in differentiable else t for t in outputs], form),
        [next(found) if id(t) in differentiable else None for t in outputs],
    )


class _Lost(Exception):
    """Why two backward passes do not give J t."""


def _refusal(name: str, reason: str) -> NotImplementedError:
    return NotImplementedError(f"{name} has no forward mode of its own (jvp), nor one by its backward pass: {reason}")


def _along(outputs: list[Tensor], inputs: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    """J t for every output."""
    if not outputs:
        return []
    # Anything but zeros would do; these are uneven, to reveal functions that are not linear.
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
    if may_look_at_values():
        _require_linear(outputs, inputs, u, back)
        _require_whole(whole, u, found, sum([g.detach().norm() * t.norm() for g, t in terms]))
    return [tangent.detach() for tangent in found]


def _may_be_zero(gradient: Tensor) -> bool:
    return not may_look_at_values() or not gradient.any()


def _require_linear(
    outputs: list[Tensor], inputs: list[Tensor], u: list[Tensor], back: Sequence[Tensor | None]
) -> None:
    """Raise unless scaled gradients come back scaled: clipping or normalising them is not a derivative."""
    scale = 16.0 if any(each.dtype == torch.float16 for each in u) else 2.0**24
    more = [each.detach() * scale for each in u]
    scaled = torch.autograd.grad(outputs, inputs, more, retain_graph=True, allow_unused=True)
    for before, after in zip(back, scaled):
        if before is not None and after is not None:
            apart = (after / scale - before.detach()).norm()
            if not apart <= _rounding(u) * before.detach().norm():
                raise _Lost("gradients scaled by a factor do not come back scaled by it")


@torch.no_grad()
def _require_whole(whole: Tensor, u: list[Tensor], found: Sequence[Tensor], size: Tensor | float) -> None:
    """Raise unless <u, J t> equals <J^T u, t>: then the derivative with respect to u covers all that came back."""
    apart = whole - sum([(a * b).sum() for a, b in zip(u, found)])
    if not bool(apart.abs() <= _rounding(u) * size):
        raise _Lost("it loses a part of the gradient that it was given, or adds to it")


def _rounding(u: list[Tensor]) -> float:
    """The relative difference of sums between passes that rounding alone may cause."""
    return max(torch.finfo(each.dtype).eps for each in u) ** 0.5
