"""kernel_grads by the library's kernel gradient of a grouped convolution, in which every example is a group of its own.

Examples are taken in chunks whose operands and results stay in a CPU's cache (docs/measured-facts.md): a result of
19 MB took four times as long in one call as in calls of 9 MB or less, which reuse the memory of earlier ones.
"""

from __future__ import annotations

from torch import Tensor

from metakern.ops.convolution import Numbers, library_gradient
from metakern.ops.kernel_grads.contract import fake
from metakern.ops.layout import examples_per_chunk
from metakern.ops.operands import accumulator


def kernel_grads(
    A: Tensor, B: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers, groups: int = 1,
    bias: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grads, shifts = fake(A, B, kernel, stride, padding, dilation, groups, bias)
    if A.shape[0] == 0:
        return grads, shifts
    size = min(examples_per_chunk(A, B), examples_per_chunk(grads, shifts))
    for a, b, grad in zip(A.split(size), B.split(size), grads.split(size), strict=True):
        # The part of the result to be filled is passed as the kernel, whose values are not read.
        found, _ = library_gradient(
            _as_channels(a), _as_channels(b), grad.flatten(0, 1), stride, padding, dilation, groups * len(a), False
        )
        grad.copy_(found.view(grad.shape))
    if bias:
        shifts = B.flatten(2).sum(2, dtype=accumulator(B.dtype)).to(B.dtype)
    return grads, shifts


def _as_channels(examples: Tensor) -> Tensor:
    """[n, c, *space] as one example of n c channels."""
    return examples.reshape(1, -1, *examples.shape[2:])
