"""What the Triton kernels share: the order of their programs, and blocks that the bulk copy engine of a GPU fetches.

Numbers of rows, examples and parts are not specialised: compiling a kernel again for a last, shorter batch would take
a second, and the alignment of no address depends on them.

`max_num_imprecise_acc` concerns eight-bit operands on compute capability 9, whose tensor cores keep some 14 bits of a
sum: K products are summed there, and these sums in float32. Triton would sum all of them there.

On compute capabilities 9 and 10 a *descriptor* tells the copy engine where a tensor lies, and a program asks for whole
blocks by their place: no addresses in registers (90 of them for a tile of 128 x 128 instead of 250), no masks, and what
lies outside reads as zero. Operands that do not lie as it wants are read through pointers, as on older chips.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from metakern.ops.triton_backend import capability, interpreting

CAPABILITIES = (9, 10)
"""Major compute capabilities that these kernels pass the checks of compiled code for; 12 has the engine as well."""
ALIGNMENT = 16
"""Bytes that the start of a tensor and the steps between its rows must be multiples of."""


@triton.jit
def grouped(program, down, across, GROUP: tl.constexpr):
    """Place of a tile in a grid of `down` x `across`: bands of GROUP rows, so that programs which run together share
    the rows and columns they read while those are in the cache."""
    band = program // (GROUP * across)
    height = tl.minimum(down - band * GROUP, GROUP)
    place = program % (GROUP * across)
    return band * GROUP + place % height, place // height


@triton.jit
def product_of_rows(
    x_start, y_start, width, stride_x, stride_y,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """X Y^T for M rows of X and N of Y, `width` long, that start at the given addresses."""
    # a loop that might not run is compiled with a wait after every product
    tl.assume(width > 0)
    product = tl.zeros((M, N), tl.float32)
    for start in range(0, width, K):
        k = start + tl.arange(0, K)
        inside = k < width
        offset = k.to(tl.int64)
        x = tl.load(x_start[:, None] + (offset * stride_x)[None, :], mask=inside[None, :], other=0.0)
        y = tl.load(y_start[None, :] + (offset * stride_y)[:, None], mask=inside[:, None], other=0.0)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        product = tl.dot(x, y, product, input_precision=PRECISION, max_num_imprecise_acc=K)
    return product


def rows_of(x: Tensor) -> Tensor | None:
    """[n, t, k] as [n t, k] without a copy, or None."""
    n, t, k = x.shape
    if t == 1 or n == 1:
        return x.select(1 if t == 1 else 0, 0)
    return x.view(n * t, k) if x.stride(0) == t * x.stride(1) else None


def copied_in_bulk(*operands: Tensor | None) -> bool:
    """Whether the copy engine can fetch blocks of all of these."""
    return all(x is not None and _copied_in_bulk(x) for x in operands)


def _copied_in_bulk(x: Tensor) -> bool:
    if interpreting:  # which has no descriptors of bfloat16
        ready = x.dtype in (torch.float32, torch.float16)
    else:
        ready = x.is_cuda and capability(x)[0] in CAPABILITIES
    steps = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = all(stride > 0 and stride * x.element_size() % ALIGNMENT == 0 for _, stride in steps)
    nested = all(outer % inner == 0 for (_, outer), (_, inner) in itertools.pairwise(steps))
    return ready and aligned and nested and x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0


def described(x: Tensor, *block: int) -> TensorDescriptor:
    """The descriptor of a tensor that is `copied_in_bulk`, for blocks of this shape."""
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    # a dimension of size one has any stride at all, and the copy engine would object to some
    harmless = max(steps, default=-(-x.shape[-1] // ALIGNMENT) * ALIGNMENT)
    strides = [stride if size > 1 else harmless for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], list(block))
