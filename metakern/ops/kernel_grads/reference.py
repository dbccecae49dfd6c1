"""kernel_grads by the library, one example after the other in the accumulating dtype: the truth."""

from __future__ import annotations

from torch import Tensor

from metakern.ops.convolution import Numbers, library_gradient
from metakern.ops.kernel_grads.contract import fake
from metakern.ops.operands import accumulator


def kernel_grads(
    A: Tensor, B: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers, groups: int = 1,
    bias: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype, settings = accumulator(A.dtype), (stride, padding, dilation, groups, bias)
    grads, shifts = fake(A, B, kernel, *settings)
    for n in range(A.shape[0]):
        one = slice(n, n + 1)
        grads[n], shifts[n] = library_gradient(A[one].to(dtype), B[one].to(dtype), kernel.to(dtype), *settings)
    return grads, shifts
