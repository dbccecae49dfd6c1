"""The compiled module `metakern._C`: whether it is there, why not, and how dtypes and streams are passed to it."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SCALARS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
"""Element types as csrc/cuda/kernels.h numbers them."""

_module: ModuleType | None
try:
    from metakern import _C as _module  # type: ignore[attr-defined]

    missing: str | None = None
except ImportError as error:  # torch is imported above, so its OpenMP runtime is there for _C
    _module = None
    missing = f"metakern._C is not there ({error}); install with METAKERN_BUILD=auto"

cpu: Any = getattr(_module, "cpu", None)
cuda: Any = getattr(_module, "cuda", None)


def unsupported(tensor: Tensor) -> str | None:
    """Why the compiled module has no kernel for this tensor's device, or None."""
    if missing is not None:
        return missing
    if tensor.is_cuda:
        return unusable(tensor.device)
    return None if tensor.is_cpu else f"metakern._C has no kernels for {tensor.device.type}"


@cache
def unusable(device: torch.device) -> str | None:
    """Why the compiled module's CUDA kernels do not run on this GPU: an architecture that they were not compiled for, a
    driver too old for their runtime."""
    if cuda is None:
        return "metakern._C was built without CUDA (no nvcc at install time)"
    with torch.cuda.device(device):
        reason = cuda.unusable()
    return f"metakern._C does not run on {device}: {reason} (see METAKERN_CUDA_ARCHS)" if reason else None


def stream(tensor: Tensor) -> int:
    """The current CUDA stream of the tensor's device, as the kernels take it."""
    return torch.cuda.current_stream(tensor.device).cuda_stream
