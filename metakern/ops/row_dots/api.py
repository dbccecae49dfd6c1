"""row_dots: the public function and its table of implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.row_dots import contract, native, reference
from metakern.ops.select import Implementation, Operator, always

OPERATOR = Operator(
    contract,
    table=(
        Implementation("native", native.row_dots, native.supports),
        Implementation("reference", reference.row_dots, always),
    ),
)


SMALL = 1 << 16
"""Elements below which, on the CPU, choosing an implementation costs more than one pass saves over two; half as many
if the dispatcher is bypassed."""


def small(X: Tensor, elements: int = SMALL) -> bool:
    """Whether torch's own dot product of rows is fastest."""
    return X.is_cpu and X.numel() < elements and X.dtype in (torch.float32, torch.float64)


def unchecked(X: Tensor, Y: Tensor) -> Tensor:
    """`row_dots` inside another operator: for operands that are known to fit, without the dispatcher."""
    if small(X, SMALL // 2):
        return torch.linalg.vecdot(X, Y)
    return OPERATOR.choose(X, Y).run(X, Y)


def row_dots(X: Tensor, Y: Tensor, *, impl: str | None = None) -> Tensor:
    """Dot product of every row of X with the same row of Y, without storing their elementwise product.

    `out_n = sum_k X_nk Y_nk`.

    Args:
        X, Y: [n, k]; if the elements of a row are not adjacent in memory, the reference runs.
        impl: None uses the first implementation that supports the case; a name never falls back.
    Returns: [n], float32, or float64 for float64 operands, summed in that dtype.
    Raises: ValueError for shapes, devices, an unknown `impl` or operands that require grad; TypeError for dtypes;
        RuntimeError if the requested implementation does not support the case.
    """
    return OPERATOR(X, Y, impl=impl)
