"""Complex outputs of calls in real numbers: spectral layers, state spaces, whose parameters are pairs of real ones.

B is then the gradient of the real and of the imaginary part, and all that is done with it is as for real tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RealParts:
    """A function whose output is complex, as one of real and imaginary parts, [..., 2]."""

    def __init__(self, func: Callable[..., Tensor]) -> None:
        self.func = func

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return real_parts(self.func(*args, **kwargs))


def real_parts(output: Tensor) -> Tensor:
    """In memory of its own, so that an operation in place on the complex view of it leaves its place in the graph."""
    return torch.view_as_real(output.resolve_conj()).clone()
