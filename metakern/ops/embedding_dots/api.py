"""embedding_dots: the public function and its table of implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops.embedding_dots import contract, native, reference
from metakern.ops.select import Implementation, Operator, always

OPERATOR = Operator(
    contract,
    table=(
        Implementation("native", native.embedding_dots, native.supports),
        Implementation("reference", reference.embedding_dots, always),
    ),
)


def embedding_dots(
    indices: Tensor, V: Tensor, B: Tensor, *, padding_idx: int | None = None, impl: str | None = None
) -> Tensor:
    """Dot product of every example's gradient with one direction, for a table look-up y = W[index].

    `out_n = sum_t V[index_nt] . B_nt`, over positions whose index is not `padding_idx`; the rows of V are not copied.

    Args:
        indices: [n, t], int64 or int32, in [0, v).
        V: the direction, shaped like the table, [v, o].
        B: gradients of the summed losses with respect to the looked-up rows, [n, t, o].
        padding_idx: the row to ignore, counted from the end if negative.
        impl: None uses the first implementation that supports the case; a name never falls back.
    Returns: [n], float32, or float64 for float64 operands, summed in that dtype.
    Raises: ValueError for shapes, devices, a padding row that V does not have, an unknown `impl` or operands that
        require grad; TypeError for dtypes; IndexError for an index outside the table (on CUDA the kernel aborts);
        RuntimeError if the requested implementation does not support the case.
    """
    if padding_idx is None:
        return OPERATOR(indices, V, B, impl=impl)
    rows = V.shape[0]
    if not -rows <= padding_idx < rows:
        raise ValueError(f"embedding_dots: padding_idx must be one of the {rows} rows of V; got {padding_idx}")
    return OPERATOR(indices, V, B, padding_idx % rows, impl=impl)
