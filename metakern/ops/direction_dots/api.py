"""direction_dots: the public function and its table of implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops import triton_backend
from metakern.ops.direction_dots import contract, native, reference
from metakern.ops.select import Implementation, Operator, always

OPERATOR = Operator(
    contract,
    table=(
        triton_backend.implementation("direction_dots"),
        Implementation("native", native.direction_dots, native.supports),
        Implementation("reference", reference.direction_dots, always),
    ),
)


def direction_dots(A: Tensor, V: Tensor, B: Tensor, *, impl: str | None = None) -> Tensor:
    """Dot product of every example's gradient with one direction, for a layer y = W x.

    `out_n = sum_t B_nt^T V A_nt = <sum_t B_nt A_nt^T, V>`, without forming the per-example gradient.

    Args:
        A: inputs of the layer, [n, t, i], any strides.
        V: the direction, shaped like the weight, [o, i]. A and V may be float8_e4m3fn while B is not; scaling is up to
            the caller.
        B: gradients of the summed losses with respect to the layer's outputs, [n, t, o].
        impl: None uses the first implementation that supports the case; a name never falls back.
    Returns: [n], float32, or float64 where B is float64; unit (loss per parameter) x (unit of V).
    Raises: ValueError for shapes, devices, an unknown `impl` or operands that require grad; TypeError for dtypes;
        RuntimeError if the requested implementation does not support the case.
    """
    return OPERATOR(A, V, B, impl=impl)
