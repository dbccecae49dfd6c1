"""affine_dots: the public function and its table of implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops.affine_dots import contract, native, reference
from metakern.ops.select import Implementation, Operator, always

OPERATOR = Operator(
    contract,
    table=(
        Implementation("native", native.affine_dots, native.supports),
        Implementation("reference", reference.affine_dots, always),
    ),
)


def affine_dots(
    X: Tensor,
    B: Tensor,
    V: Tensor,
    v: Tensor | None = None,
    *,
    eps: float = 1e-5,
    centred: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Dot of every example's gradient with one direction, for the affine part of a normalisation.

    `out_n = sum_t,i B_nti (x^_nti V_i + v_i)`, `x^ = (x - mean) / sqrt(var + eps)` of every row when `centred` (layer
    normalisation), `x / sqrt(mean(x^2) + eps)` otherwise (RMS normalisation); x^ is never written.

    Args:
        X: inputs of the normalisation, [n, t, i].
        B: gradients of the summed losses at its outputs, [n, t, i].
        V, v: the directions of scale and shift, [i]; v may be None.
        impl: None takes the first implementation that supports the case; a name never falls back.
    Returns: [n], float32, or float64 for float64 operands, summed in that dtype.
    Raises: ValueError for shapes, devices, eps, an unknown `impl` or operands that require grad; TypeError for dtypes;
        RuntimeError if the implementation asked for does not support the case.
    """
    return OPERATOR(X, B, V, v, eps, centred, impl=impl)
