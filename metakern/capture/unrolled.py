"""Let function modes see calls that bypass them: in torch functions written in Python, and operators of extensions."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

_PLAIN = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
_TENSORS_ALONE = (Tensor,)
"""The types passed with a function written in Python if no tensor is of a subclass."""
_BACKWARD = frozenset((torch.autograd.grad, torch.autograd.backward, Tensor.backward))


def unrolled(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func` without its own torch-function dispatch, so that the calls in its body are seen one by one."""
    ignore = {name: lambda *_: False for name in ("has_torch_function", "has_torch_function_unary")}
    ignore["has_torch_function_variadic"] = lambda *_: False
    copy = types.FunctionType(
        func.__code__, {**func.__globals__, **ignore}, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def dispatches(types: Iterable[type]) -> bool:
    """Whether torch will call a `__torch_function__` that one of these types defines; it may do anything."""
    if types == _TENSORS_ALONE:
        return False
    own = any(getattr(kind.__torch_function__, "__func__", None) is not _PLAIN for kind in types)
    return own and torch._C._is_torch_function_enabled()  # disabled while such a method calls torch's own


def dispatched(func: Callable[..., Any], types: tuple[type, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call as handled by the types, in torch's order; function modes see the calls inside.

    Raises: TypeError if none of them knows the function, as torch does.
    """
    for kind in types:
        output = kind.__torch_function__(func, types, args, kwargs)  # type: ignore[attr-defined]
        if output is not NotImplemented:
            return output
    raise TypeError(f"no __torch_function__ of {[kind.__name__ for kind in types]} implements {func}")


class SeeingMode(TorchFunctionMode):
    """A function mode that sees extensions' operators even where subclasses are disabled, as inside their methods.

    Since torch 2.14, operators written in Python have a shortcut to their kernels, which in such places does not check
    whether a mode is active. While a mode is active, they go through the dispatcher like all operators.
    """

    _active = 0
    _turn = threading.Lock()

    def __enter__(self) -> Any:
        with SeeingMode._turn:
            if SeeingMode._active == 0 and _SHORT_WAY is not None:
                OpOverload.__call__ = _by_the_dispatcher
            SeeingMode._active += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with SeeingMode._turn:
            SeeingMode._active -= 1
            if SeeingMode._active == 0 and _SHORT_WAY is not None:
                OpOverload.__call__ = _SHORT_WAY  # type: ignore[method-assign]


def _by_the_dispatcher(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    return self._cpp_dispatch_handle(*args, **kwargs)


_SHORT_WAY = OpOverload.__call__ if hasattr(OpOverload, "_enable_pyobj_dispatch") else None


class LastingMode(SeeingMode):
    """A function mode that stays active in backward passes, where checkpointed layers run again."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _BACKWARD:
            with self:
                return unrolled(func)(*args, **(kwargs or {}))
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle any other call."""
        raise NotImplementedError
