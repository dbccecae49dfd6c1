"""What a dual pass need not compute again: the products of inputs and weights, known from the pass that it repeats.

The output of a linear layer or convolution is dual: Y + r dY with dY = dA W^T + A dW^T + db. The first pass has made
Y, and mostly keeps it for its backward pass, so that the dual pass is left with two products of the three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metakern.engines.repetition import agree

_PRODUCTS = frozenset(
    (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
)
_OPERANDS = ("input", "weight", "bias")
SAMPLED = 67
"""One number in so many of a large input is compared with that of the first pass; every example's loss is anyway."""
LARGE = 1 << 14


class _Product(NamedTuple):
    function: Callable[..., Tensor]
    input: Tensor
    output: Tensor
    versions: tuple[int, int]

    @property
    def intact(self) -> bool:
        """Nothing was written into them since."""
        return self.versions == (self.input._version, self.output._version)


class Products(TorchFunctionMode):
    """While active, notes the products of a pass, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Product] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            x = args[0] if args else (kwargs or {})["input"]
            if _is_noted(x) and _is_noted(output):
                x, y = x.detach(), output.detach()
                self.found.append(_Product(func, x, y, (x._version, y._version)))
        return output


class ReusedProducts(TorchFunctionMode):
    """While active, a pass takes the values of its products from those of the first, as long as they are the same."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self._left = iter(products.found)
        self._agreed: list[Tensor] = []

    def agreed(self) -> bool:
        """Were the inputs of all products those of the first pass?"""
        return not self._agreed or bool(torch.stack(self._agreed).all())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        given = dict(zip(_OPERANDS, args, strict=False)) | {k: v for k, v in kwargs.items() if k in _OPERANDS}
        known = next(self._left, None) if _is_noted(given["input"]) else None
        if known is None:
            return func(*args, **kwargs)
        x, w, b = (_dual(given.get(name)) for name in _OPERANDS)
        if func is not known.function or x.primal.shape != known.input.shape:
            self._left = iter(())  # another sequence of calls
            return func(*args, **kwargs)
        if not known.intact or x.primal.dtype != known.input.dtype or (x.tangent is None and w.tangent is None):
            return func(*args, **kwargs)
        settings = {k: v for k, v in kwargs.items() if k not in _OPERANDS}

        def product(left: Tensor, right: Tensor, shift: Tensor | None) -> Tensor:
            return func(left, right, shift, *args[len(_OPERANDS) :], **settings)

        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            self._agreed.append(agree(_sample(x.primal), _sample(known.input)).all())
            if x.tangent is None:
                tangent = product(x.primal, w.tangent, b.tangent)
            else:
                tangent = product(x.tangent, w.primal, b.tangent)
                if w.tangent is not None:
                    tangent = tangent + product(x.primal, w.tangent, None)
        return forward_ad.make_dual(known.output, tangent)


def _is_noted(tensor: Tensor) -> bool:
    """Only what outlives its call: no constant made without gradients, nothing inside vmap, and nothing of layers that
    run again in the backward pass (checkpointing) in order that their outputs need not be kept.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_inference()
        and torch.is_grad_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


class _Dual(NamedTuple):
    primal: Any
    tangent: Any


def _dual(tensor: Any) -> _Dual:
    if not isinstance(tensor, Tensor):
        return _Dual(tensor, None)
    primal, tangent = forward_ad.unpack_dual(tensor)
    return _Dual(primal, None if tangent is None or tangent._is_zerotensor() else tangent)


def _sample(tensor: Tensor) -> Tensor:
    """Every `SAMPLED`-th number, in the order of memory where that is without gaps; all where they are few."""
    if tensor.numel() < LARGE:
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    if tensor.numel() != extent:
        return tensor.flatten()[::SAMPLED]
    return tensor.as_strided((-(-extent // SAMPLED),), (SAMPLED,))
