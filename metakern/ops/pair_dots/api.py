"""pair_dots: the public function and its table of implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops import triton_backend
from metakern.ops.pair_dots import contract, native, reference
from metakern.ops.select import Implementation, Operator, always

OPERATOR = Operator(
    contract,
    table=(
        triton_backend.implementation("pair_dots"),
        Implementation("native", native.pair_dots, always),
        Implementation("reference", reference.pair_dots, always),
    ),
)


def pair_dots(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor, *, impl: str | None = None) -> Tensor:
    """Dot product of every example's gradient with the summed meta gradient, or with each meta example's, by pairs.

    `out_n = sum_t,s (A_nt . A'_s)(B_nt . B'_s)` for a layer y = W x; s runs over all positions of all meta examples,
    and the caller divides by their number. Equal to `direction_dots` with V = B'^T A', and cheaper if
    s (i + o) < i o. With a dimension for the meta examples, `out_nm = sum_t,s (A_nt . A'_ms)(B_nt . B'_ms)`.

    Args:
        A, B: inputs and output gradients of the batch, [n, t, i] and [n, t, o], any strides.
        A_meta, B_meta: the same for the meta batch, positions flattened, [s, i] and [s, o], any strides; or for each
            meta example, [m, s, i] and [m, s, o].
        impl: None uses the first implementation that supports the case; a name never falls back.
    Returns: [n], or [n, m] for each meta example; float32, or float64 for float64 operands; unit (loss per
        parameter)^2.
    Raises: ValueError for shapes, devices, an unknown `impl` or operands that require grad; TypeError for dtypes;
        RuntimeError if the requested implementation does not support the case.
    """
    return OPERATOR(A, B, A_meta, B_meta, impl=impl)
