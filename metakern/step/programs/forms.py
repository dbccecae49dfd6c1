"""What stands for a value among the assumptions of a program: of a tensor all but its values."""

from __future__ import annotations

import random
from array import array
from typing import Any, NamedTuple

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


def numbers_of(value: Any, largest: int) -> Any:
    """The values of an array or a NumPy scalar, or the state of a generator of torch, Python or NumPy; an array with
    more than `largest` entries, and anything else, stands for itself.
    """
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if hasattr(value, "bit_generator"):
        return repr(value.bit_generator.state)
    if hasattr(value, "get_state"):  # numpy.random.RandomState
        kind, key, *place = value.get_state()
        return repr((kind, key.tobytes(), place))
    if isinstance(value, bytearray):
        return bytes(value) if len(value) <= largest else value
    return value.tobytes() if hasattr(value, "tobytes") and _size(value) <= largest else value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, array) else value.size
