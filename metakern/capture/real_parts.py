"""Complex outputs of calls as pairs of real numbers, for spectral layers and state spaces with real parameters.

B is then the gradient of the real and the imaginary part, and is treated like any other B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RealParts:
    """Wraps a function with a complex output: returns its real and imaginary parts, [..., 2]."""

    def __init__(self, func: Callable[..., Tensor]) -> None:
        self.func = func

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return real_parts(self.func(*args, **kwargs))


def real_parts(output: Tensor) -> Tensor:
    """A clone, since an in-place operation on the complex result would take the edge of a view off the graph's path."""
    return torch.view_as_real(output.resolve_conj()).clone()
