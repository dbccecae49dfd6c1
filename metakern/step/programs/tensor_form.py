"""A tensor without its values: what a program that was made with it needs of another one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metakern.capture.layout import stored


class TensorForm(NamedTuple):
    """What `form_of` returns."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device
    requires_grad: bool
    hooked: bool
    place: int  # address in memory; 0 if that does not matter
    number: str  # its value, if the host reads it; "" if that does not matter


def form_of(tensor: Tensor, places: bool) -> TensorForm:
    """With `places`, for CUDA graphs, its address counts as well, and the value of a single number on the CPU."""
    first = stored(tensor)[0]
    hooked, place = bool(tensor._backward_hooks), first.data_ptr() if places else 0
    number = repr(tensor.item()) if places and tensor.is_cpu and tensor.dim() == 0 else ""
    known = tensor.dtype, tensor.shape, first.stride(), tensor.device
    return TensorForm(*known, tensor.requires_grad, hooked, place, number)
