"""affine_grads: the public function and its table of implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops.affine_grads import contract, native, reference
from metakern.ops.select import Implementation, Operator, always

OPERATOR = Operator(
    contract,
    table=(
        Implementation("native", native.affine_grads, native.supports),
        Implementation("reference", reference.affine_grads, always),
    ),
)


def affine_grads(
    X: Tensor,
    B: Tensor,
    *,
    eps: float = 1e-5,
    centred: bool = True,
    shift: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-example gradients of scale and shift of a normalisation, which are small: one entry per channel.

    `G_ni = sum_t B_nti x^_nti` and `H_ni = sum_t B_nti`, with `x^ = (x - mean) / sqrt(var + eps)` of every row if
    `centred` (layer normalisation), `x / sqrt(mean(x^2) + eps)` otherwise (RMS normalisation); x^ is never stored.

    Args:
        X: inputs of the normalisation, [n, t, i].
        B: gradients of the summed losses with respect to its outputs, [n, t, i].
        shift: whether to compute H; if not, H has shape [n, 0].
        impl: None uses the first implementation that supports the case; a name never falls back.
    Returns: G and H, [n, i], float32, or float64 for float64 operands, summed in that dtype.
    Raises: ValueError for shapes, devices, eps, an unknown `impl` or operands that require grad; TypeError for dtypes;
        RuntimeError if the requested implementation does not support the case.
    """
    return OPERATOR(X, B, eps, centred, shift, impl=impl)
