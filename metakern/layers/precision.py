"""Lower precision for the products behind the dots, if the caller allows it: the dots only determine the weights.

"tf32" multiplies float32 operands as the tensor cores of a GPU do; "bf16" rounds operands to bfloat16; "fp8" rounds
those of linear layers to eight bits, each tensor scaled to their range, and others to bfloat16. Sums stay in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from metakern import ops
from metakern.ops.operands import EIGHT_BITS

PRECISIONS = ("same", "tf32", "bf16", "fp8")


def require_precision(precision: str, device: torch.device) -> None:
    """Raise ValueError for an unknown name, or for a precision that the device does not support."""
    if precision not in PRECISIONS:
        raise ValueError(f"dot_precision must be one of {list(PRECISIONS)}, got {precision!r}")
    if precision not in ("tf32", "fp8"):
        return
    needed = (8, 0) if precision == "tf32" else (8, 9)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < needed:
        raise ValueError(
            f"dot_precision={precision!r} needs a CUDA device of compute capability {needed[0]}.{needed[1]}; the model "
            f"is on {device}"
        )


def lowered(precision: str, *operands: Tensor) -> tuple[Tensor, ...]:
    """The operands, rounded to bfloat16 if `precision` asks for it."""
    return tuple(x.to(torch.bfloat16) for x in operands) if precision in ("bf16", "fp8") else operands


def direction_dots(precision: str, a: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """`ops.direction_dots` of rounded operands; gradients need their range, so B is never rounded to eight bits."""
    if precision != "fp8":
        return ops.direction_dots(*lowered(precision, a, v, b))
    (a, a_scale), (v, v_scale) = _eight_bits(a), _eight_bits(v)
    return ops.direction_dots(a, v, b.to(torch.bfloat16)) / (a_scale * v_scale)


def _eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor scaled to the range of eight bits and rounded, and the scale; the host does not wait, and no float32
    copy is made.
    """
    largest = torch.linalg.vector_norm(x, math.inf).float() if x.numel() else torch.zeros((), device=x.device)
    scale = torch.where(largest > 0, torch.finfo(EIGHT_BITS).max / largest, 1.0)
    return (x * scale).to(EIGHT_BITS), scale


def products(precision: str) -> AbstractContextManager[None]:
    """Inside the block, torch's products and ours use TF32 if `precision` is "tf32"."""
    return _in_tf32() if precision == "tf32" else nullcontext()


@contextmanager
def _in_tf32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    newer = matmul, cudnn.conv, cudnn.rnn
    before = [kind.fp32_precision for kind in newer]
    if before == 3 * ["tf32"]:
        yield
        return
    _allow_tf32(True, True)
    try:
        yield
    finally:
        _allow_tf32(before[0] == "tf32", before[1:] == ["tf32", "tf32"])
        for kind, precision_before in zip(newer, before):
            kind.fp32_precision = precision_before


def _allow_tf32(matmul: bool, cudnn: bool) -> None:
    """Set the older flags, which set the newer ones as well, and of which some versions of torch warn. Only the newer
    ones are read, since reading the older raises if the user has set only the newer.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API settings to control TF32", UserWarning)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
