"""Triton as an optional backend: whether it can run a case, and how its kernels are found.

An operator's `triton.py` is imported when it is first asked for, so that the library works without Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from metakern.ops.operands import EIGHT_BITS
from metakern.ops.select import Implementation

missing = None if importlib.util.find_spec("triton") is not None else "triton is not installed"
interpreting = os.environ.get("TRITON_INTERPRET") == "1"


def implementation(operator: str) -> Implementation:
    """The table's entry for `metakern.ops.<operator>.triton`, whose function has the operator's name."""
    module = f"metakern.ops.{operator}.triton"

    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), operator)(*arguments)

    return Implementation("triton", run, unsupported)


def unsupported(*operands: Any) -> str | None:
    """Why Triton cannot run this case, or None."""
    if missing is not None:
        return missing
    first = operands[0]
    if not first.is_cuda and not interpreting:
        return "needs a CUDA tensor"
    # the gradients may be wider than the records; weights are rounded, whatever they are
    if any(isinstance(x, Tensor) and x.dim() == 3 and x.dtype is torch.float64 for x in operands):
        return "accumulates in float32; float64 needs float64"
    needed = (8, 9) if first.dtype is EIGHT_BITS else (8, 0)
    if first.is_cuda and capability(first) < needed:
        return f"needs compute capability {needed[0]}.{needed[1]}"
    if first.dim() == 3 and first.shape[0] * first.shape[1] > MAX_ROWS:
        return f"counts rows in 32 bits, up to {MAX_ROWS}"
    return None


MAX_ROWS = 2**31 - 2**16
"""A little less than the largest 32-bit integer, so that the end of the last tile does not overflow."""


@cache
def _properties(device: torch.device) -> Any:
    """PyTorch looks a device up anew each time; every call of an operator asks for several."""
    return torch.cuda.get_device_properties(device)


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's GPU."""
    found = _properties(tensor.device)
    return found.major, found.minor


def multiprocessors(tensor: Tensor) -> int:
    """How many the tensor's GPU has; 132, as an H200, under the interpreter."""
    return _properties(tensor.device).multi_processor_count if tensor.is_cuda else 132


def shared_memory(tensor: Tensor) -> int:
    """Bytes of it that a program on the tensor's GPU may have, nearly all of a multiprocessor; an H200's, as above."""
    return _properties(tensor.device).shared_memory_per_block_optin if tensor.is_cuda else 227 * 1024


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: TF32 where the user has allowed it, else three TF32 products that make up
    for its rounding."""
    if dtype is not torch.float32:
        return "ieee"
    # reading `allow_tf32` raises if the user has set this newer flag
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
