"""Repeat a traced call, with parameters replaced: the exact derivative of any torch function.

This handles calls that no layer rule knows: forward mode through that one call for the dots,
`dots_n = <B_n, d/dr f(A_n; p + r V)>`, and one vector-Jacobian product for the weighted gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metakern.capture.host import host_may_wait
from metakern.capture.module_call import ModuleCall
from metakern.capture.record import Call
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.repeatable import drawn_alike
from metakern.capture.state.random_state import random_state, restore_random_state
from metakern.capture.trace import tensors_in
from metakern.layers.forward.forms import twice_differentiable
from metakern.layers.forward.forward_mode import dual_level, lacks_forward_mode


def with_parameters(call: Call, replacement: Callable[[Tensor], Any]) -> list[Tensor]:
    """Repeat the call with every trainable tensor replaced, other tensors detached. Returns all output tensors."""
    args, kwargs = list(call.args), dict(call.kwargs)
    chosen = {path: replacement(tensor) for path, tensor in call.parameters}
    for container in (args, kwargs):
        for key in range(len(args)) if container is args else list(kwargs):
            container[key] = _replaced(container[key], key, chosen)  # type: ignore[call-overload]
    if call.in_place:
        args[0] = args[0].clone()
    with as_recorded(call):
        output = call.func(*args, **kwargs)
    return list(tensors_in(args[0] if call.in_place else output))


def _replaced(value: Any, key: int | str, chosen: Mapping[Any, Any]) -> Any:
    if isinstance(value, Tensor):
        return chosen[key, None] if (key, None) in chosen else value.detach()
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return type(value)(
            chosen[key, i] if (key, i) in chosen else v.detach() if isinstance(v, Tensor) else v
            for i, v in enumerate(value)
        )
    return value


@contextmanager
def as_recorded(call: Call) -> Iterator[None]:
    """The random state and autocast setting that the call ran under, and torch's own function, not a subclass's."""
    if call.rng_state is not None and not host_may_wait():
        raise EngineUnavailable(
            f"{call.name} draws random numbers, and its derivative takes a second call with the same numbers, which "
            "a CUDA graph cannot make; set its dropout to 0, or run the step without capturing it"
        )
    with ExitStack() as stack:
        if not isinstance(call.func, ModuleCall):  # inside a module, subclasses act as before
            stack.enter_context(torch._C.DisableTorchFunctionSubclass())
        if call.autocast is not None:
            kind, dtype = call.autocast
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
        if call.rng_state is not None:
            stack.callback(restore_random_state, random_state())
            restore_random_state(call.rng_state)
            stack.enter_context(drawn_alike())
        yield


def output_tangents(call: Call, tangents: Mapping[int, Tensor]) -> list[Tensor | None]:
    """d/dr f(A; p + r V) for every tensor that the call returns, by forward mode through the call alone."""

    def dual(parameter: Tensor) -> Tensor:
        primal, tangent = parameter.detach(), tangents.get(id(parameter))
        return primal if tangent is None else forward_ad.make_dual(primal, tangent.to(primal.dtype))

    try:
        with dual_level(), sdpa_kernel(SDPBackend.MATH):
            return [forward_ad.unpack_dual(t).tangent for t in with_parameters(call, dual)]
    except (NotImplementedError, RuntimeError) as error:
        if not lacks_forward_mode(error):
            raise
        return _tangents_by_two_reversals(call, tangents)


def _with_leaves(call: Call) -> tuple[list[Tensor], dict[int, Tensor]]:
    """The outputs of the repeated call, with leaves instead of its parameters, and these by identity."""
    leaves: dict[int, Tensor] = {}

    def leaf(parameter: Tensor) -> Tensor:
        return leaves.setdefault(id(parameter), parameter.detach().requires_grad_())

    return with_parameters(call, leaf), leaves


def _tangents_by_two_reversals(call: Call, tangents: Mapping[int, Tensor]) -> list[Tensor | None]:
    """The same without forward mode: with g(u) = J^T u, which is linear in u, J V = d<g(u), V>/du."""
    with torch.enable_grad(), twice_differentiable():
        outputs, leaves = _with_leaves(call)
        kept = [o for o in outputs if o.requires_grad]
        cotangents = [torch.zeros_like(o, requires_grad=True) for o in kept]
        grads = torch.autograd.grad(kept, list(leaves.values()), cotangents, create_graph=True, allow_unused=True)
        along = [
            (g * tangents[key].to(g.dtype)).sum() for key, g in zip(leaves, grads) if g is not None and key in tangents
        ]
        try:
            found = iter(torch.autograd.grad(sum(along[1:], along[0]), cotangents, allow_unused=True))
        except RuntimeError as error:
            raise EngineUnavailable(f"{call.name} has neither a forward mode nor a second derivative") from error
    return [next(found) if o.requires_grad else None for o in outputs]


def parameter_gradients(
    call: Call, places: tuple[int, ...], output_grads: tuple[Tensor | None, ...]
) -> dict[int, Tensor]:
    """sum over outputs of (d output / d parameter)^T output_grad, for each trainable tensor of the call."""
    with torch.enable_grad():
        outputs, leaves = _with_leaves(call)
    wanted = [(outputs[place], grad) for place, grad in zip(places, output_grads) if grad is not None]
    wanted = [(output, grad) for output, grad in wanted if output.requires_grad]  # shapes, signs and indices do not
    if not wanted:
        return {}
    found = torch.autograd.grad(
        [o for o, _ in wanted], list(leaves.values()), [g.to(o.dtype) for o, g in wanted], allow_unused=True
    )
    return {key: g for key, g in zip(leaves, found) if g is not None}
