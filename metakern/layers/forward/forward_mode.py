"""Forward-mode differentiation that agrees with reverse mode."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._pytree import tree_leaves

from metakern.layers.forward.custom_functions import custom_functions_forward, through_backward
from metakern.layers.forward.dual import is_dual
from metakern.layers.forward.forms import Forms
from metakern.layers.forward.forward_forms import FORWARD_FORMS

_ONE_AT_A_TIME = threading.RLock()
"""torch has one level of dual numbers per process, shared by all threads."""


class _ForwardMode(Forms):
    """Treats all under `torch.no_grad()` as constant, as backward passes do; torch's forward mode differentiates it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            with forward_ad._set_fwd_grad_enabled(False):
                return super().__torch_function__(func, types, args, kwargs)
        if not isinstance(func, _OPERATORS) or str(func).startswith(_TORCHS_OWN):
            return super().__torch_function__(func, types, args, kwargs)
        given = any(map(is_dual, tree_leaves((args, kwargs))))
        try:
            output = super().__torch_function__(func, types, args, kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if not (given and lacks_forward_mode(error) and _may_run_again(func)):
                raise
        else:
            if not _lost(output, given or isinstance(func, HigherOrderOperator)):
                return output
        if not _may_run_again(func):
            raise NotImplementedError(f"operator {func} has no forward mode")
        return through_backward(func, args, kwargs, f"operator {func}")


_OPERATORS = OpOverload, OpOverloadPacket, HigherOrderOperator
_TORCHS_OWN = "aten.", "prims."
"""Operators that raise by themselves if they have no forward mode; derivatives may be made of the latter."""


def _lost(output: Any, given: bool) -> bool:
    """Operators whose derivatives are written in Python (`torch.library.custom_op`, `torch.cond`, scans) silently lose
    tangents if no argument requires a gradient: something dual went in, or may have through a closure, and nothing dual
    came out.
    """
    outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return given and bool(outputs) and not any(map(is_dual, outputs))


def _may_run_again(operator: Any) -> bool:
    """Whether it belongs to an extension and writes into none of its arguments."""
    if isinstance(operator, HigherOrderOperator):
        return False
    overloads = [operator] if isinstance(operator, OpOverload) else map(operator.__getattr__, operator.overloads())
    return not any(each._schema.is_mutable for each in overloads)


@contextmanager
def dual_level() -> Iterator[None]:
    """`forward_ad.dual_level` with gradients enabled, so that a `no_grad` block inside can be recognised; without the
    deprecation warnings that torch raises about itself on first use.
    """
    # torch's level before ours: it raises if one is open, and what is patched then stays patched for the outer one
    with _ONE_AT_A_TIME, torch.enable_grad(), forward_ad.dual_level(), custom_functions_forward():
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            forward_ad.make_dual(torch.zeros(1, device="cpu"), torch.zeros(1, device="cpu"))
        with _ForwardMode(FORWARD_FORMS):
            yield


def lacks_forward_mode(error: Exception) -> bool:
    """Whether this is torch's error for an operation without a forward-mode formula, or with a faulty one, or for a
    model that takes gradients inside its forward pass, of which a dual pass has none.
    """
    words = ("forward ad", "forward mode", "forward gradient", "jvp", "efficientzerotensor", "does not require grad")
    words += ("_fw_primal",)  # of `requires_grad_` in a dual pass
    return any(word in str(error).lower() for word in words)
