"""dual_linear: the public function and its table of implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops import triton_backend
from metakern.ops.dual_linear import contract, native, reference
from metakern.ops.select import Implementation, Operator, always

OPERATOR = Operator(
    contract,
    table=(
        triton_backend.implementation("dual_linear"),
        Implementation("native", native.dual_linear, always),
        Implementation("reference", reference.dual_linear, always),
    ),
)


def dual_linear(A: Tensor, dA: Tensor, W: Tensor, dW: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """A linear layer on dual numbers: its value, and its tangent when inputs and weights both move.

    `Y = A W^T` and `dY = dA W^T + A dW^T`.

    Args:
        A, dA: inputs and their tangent, [r, i], any strides.
        W, dW: the weight and its tangent, [o, i], any strides.
        impl: None takes the first implementation that supports the case; a name never falls back.
    Returns: Y and dY, [r, o], in the dtype of the operands, accumulated in float32, or float64 for float64.
    Raises: ValueError for shapes, devices, an unknown `impl` or operands that require grad; TypeError for dtypes;
        RuntimeError if the implementation asked for does not support the case.
    """
    return OPERATOR(A, dA, W, dW, impl=impl)
