"""Costly values that a dual pass takes from the pass that it repeats.

The output of a linear layer or convolution is dual: Y + r dY with dY = dA W^T + A dW^T + db. The first pass has made
Y, and mostly keeps it for its backward pass, so the dual pass computes only two of the three products. For batch
normalisation it reuses the statistics; the Jacobian is symmetric, so one call of the backward kernel gives the
tangent. For max pooling it reuses the indices of the largest entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import TorchFunctionMode

from metakern.capture.host import may_look_at_values
from metakern.capture.state.snapshot import address
from metakern.capture.unrolled import dispatches
from metakern.engines.repetition import agree

_PRODUCTS = frozenset(
    (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
)
_POOLINGS = frozenset((F.max_pool2d, torch.max_pool2d))
_ARGUMENTS = dict.fromkeys(_PRODUCTS, ("input", "weight", "bias")) | {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
}
_ARGUMENTS |= dict.fromkeys(_POOLINGS, ("input",))
_BATCH_STATISTICS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")


class _Call(NamedTuple):
    function: Callable[..., Tensor]
    operands: tuple[Tensor | None, ...]  # input, weight, bias
    known: tuple[Tensor, ...]  # see _known
    versions: tuple[int, ...]

    @property
    def usable(self) -> bool:
        """Something is known, and nothing was written into it since."""
        return bool(self.known) and self.versions == _versions(*self.operands, *self.known)

    def met_again(self, function: Callable[..., Tensor], operands: tuple[Any, ...]) -> bool:
        """Whether it is the same call, judging by function, shapes and dtypes."""
        return function is self.function and all(
            one is other if one is None or other is None else one.shape == other.shape and one.dtype == other.dtype
            for one, other in zip(self.operands, operands, strict=True)
        )


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors if tensor is not None)


class Products(TorchFunctionMode):
    """While active, notes the products and normalisations of a pass, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _ARGUMENTS and not dispatches(types):
            with torch._C.DisableTorchFunction():
                self._note(func, _operands(func, args, kwargs or {}), output)
        return output

    def _note(self, func: Callable[..., Any], operands: tuple[Any, ...], output: Any) -> None:
        if _is_noted(operands[0]):
            operands = tuple(None if t is None else t.detach() for t in operands)
            known = _known(func, output)
            self.found.append(_Call(func, operands, known, _versions(*operands, *known)))


class ReusedProducts(TorchFunctionMode):
    """While active, a pass reuses the values of the first pass; `agreed` tells whether operands were the same."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self._left = iter(products.found)
        self._others: list[Tensor] = []  # one boolean per operand: does it differ from the first pass?

    def agreed(self) -> bool:
        """Whether all operands were those of the first pass."""
        return not any(bool(torch.stack(found).any()) for found in _by_device(self._others))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = None
        if func in _ARGUMENTS and not dispatches(types):
            with torch._C.DisableTorchFunction():
                found = self._reused(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if found is None else found

    def _reused(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The dual output, if the first pass met the same call."""
        operands = _operands(func, args, kwargs)
        first = next(self._left, None) if _is_noted(operands[0]) else None
        if first is None:
            return None
        x, w, b = (_dual(operand) for operand in operands)
        if not first.met_again(func, (x.primal, w.primal, b.primal)):
            self._left = iter(())  # from here on, the calls are others than in the first pass
            return None
        if not first.usable or (x.tangent is None and w.tangent is None):
            return None
        if any(operand is not None and operand.requires_grad for operand in operands):
            return None  # the model takes gradients inside its forward pass, through this call
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            if may_look_at_values():
                self._compare(first.operands, (x.primal, w.primal, b.primal))
            if func in _POOLINGS:
                assert x.tangent is not None  # the only operand
                output, indices = first.known
                tangent = _largest(x.tangent, indices)
            elif func in _PRODUCTS:
                settings = {key: value for key, value in kwargs.items() if key not in _ARGUMENTS[func]}
                output = first.known[0]
                tangent = _product(func, x, w, b, args[len(_ARGUMENTS[func]) :], settings)
            else:
                given = dict(zip(_ARGUMENTS[func], args, strict=False)) | kwargs
                output = func(**(given | {"input": x.primal, "weight": w.primal, "bias": b.primal}))
                tangent = _normalised(x, w, b, first.known, given.get("eps", 1e-5))
        return forward_ad.make_dual(output, tangent.to(output.dtype))

    def _compare(self, first: tuple[Tensor | None, ...], again: tuple[Tensor | None, ...]) -> None:
        """Compare operands, unless they are the same memory. They come from the same operations, so nearly always all
        bits agree; on the CPU, where looking at the result costs no synchronisation, rounding is tolerated.
        """
        for one, other in zip(again, first, strict=True):
            if one is None or other is None or _place(one) == _place(other):
                continue
            if one.device.type != "cpu":
                self._others.append((one != other).any())
            elif not torch.equal(one, other):
                self._others.append(~agree(one, other).all())


class _Dual(NamedTuple):
    primal: Any
    tangent: Any


def _dual(tensor: Any) -> _Dual:
    if not isinstance(tensor, Tensor):
        return _Dual(tensor, None)
    primal, tangent = forward_ad.unpack_dual(tensor)
    return _Dual(primal, None if tangent is None or tangent._is_zerotensor() else tangent)


def _product(
    function: Callable[..., Tensor], x: _Dual, w: _Dual, b: _Dual, rest: tuple[Any, ...], settings: dict[str, Any]
) -> Tensor:
    """dA W^T + A dW^T + db, for a convolution likewise."""
    if x.tangent is None:
        return function(x.primal, w.tangent, b.tangent, *rest, **settings)
    tangent = function(x.tangent, w.primal, b.tangent, *rest, **settings)
    return tangent if w.tangent is None else tangent.add_(function(x.primal, w.tangent, None, *rest, **settings))


def _largest(tangent: Tensor, indices: Tensor) -> Tensor:
    """dA at the largest entry of each window; indices count within a plane of an image."""
    return tangent.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices)


def _normalised(x: _Dual, w: _Dual, b: _Dual, statistics: tuple[Tensor, ...], eps: float) -> Tensor:
    """w s (dA - mean(dA) - A~ mean(A~ dA)) + dw A~ + db with A~ = s (A - mean(A)), s = 1 / sqrt(var(A) + eps)."""
    mean, scale = statistics
    columns = (1, -1, *(1,) * (x.primal.dim() - 2))
    slope = torch.zeros_like(mean) if w.tangent is None else scale * w.tangent
    shift = -mean * slope if b.tangent is None else b.tangent - mean * slope
    slope, shift = slope.view(columns), shift.view(columns)
    if x.tangent is None:
        return torch.addcmul(shift, x.primal, slope)
    through_input, _, _ = torch.ops.aten.native_batch_norm_backward(
        x.tangent, x.primal, w.primal, None, None, mean, scale, True, eps, (True, False, False)
    )
    return through_input.to(slope.dtype).addcmul_(x.primal, slope).add_(shift)  # in place, to save memory


def _known(function: Callable[..., Any], output: Any) -> tuple[Tensor, ...]:
    """What can be reused of a call: the output of a product; output and indices of a pooling; mean and 1 / deviation
    per channel of a batch normalisation, if autograd keeps these.
    """
    if function in _PRODUCTS:
        return (output.detach(),)
    node: Any = output.grad_fn if isinstance(output, Tensor) else None  # a pooling may return a pair
    if node is None:
        return ()
    kind = node.name()
    if kind == "MaxPool2DWithIndicesBackward0":
        return output.detach(), node._saved_result1
    if kind in _BATCH_STATISTICS and node._saved_training:
        return node._saved_result1, node._saved_result2
    return ()


def _is_noted(tensor: Tensor) -> bool:
    """Whether a call with this input is noted: not under no_grad, not inside vmap, and not in checkpointed layers,
    whose outputs are not meant to be kept.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_inference()
        and torch.is_grad_enabled()
        and peek_interpreter_stack() is None
        and _top_saved_tensors_default_hooks(False) is None
    )


def _operands(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Input, weight and bias."""
    given = dict(zip(_ARGUMENTS[function], args, strict=False)) | kwargs
    return given["input"], given.get("weight"), given.get("bias")


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return address(tensor), tensor.stride()


def _by_device(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    for device in {tensor.device for tensor in tensors}:
        yield [tensor for tensor in tensors if tensor.device == device]
