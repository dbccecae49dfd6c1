"""cross_entropy_rows: the public function and its table of implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops.cross_entropy_rows import contract, native, reference
from metakern.ops.select import Implementation, Operator, always

OPERATOR = Operator(
    contract,
    table=(
        Implementation("native", native.cross_entropy_rows, native.supports),
        Implementation("reference", reference.cross_entropy_rows, always),
    ),
)


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of every row, and what its derivative needs, from reading the logits once.

    `losses_r = log sum_c exp(z_rc) - (1 - s) z_ry - s mean_c z_rc` with smoothing s, 0 where y is `ignore_index`;
    `highs_r = max_c z_rc` and `sums_r = sum_c exp(z_rc - highs_r)`: the softmax is exp(z_rc - highs_r) / sums_r.

    Args:
        logits: [r, C]; if the classes of a row are not adjacent in memory, the reference runs.
        targets: [r], int64, in [0, C) or `ignore_index`.
        label_smoothing: s, in [0, 1].
        impl: None uses the first implementation that supports the case; a name never falls back.
    Returns: losses, highs and sums, [r] each, float32, or float64 for float64 logits.
    Raises: ValueError for shapes, devices, smoothing, an unknown `impl` or logits that require grad; TypeError for
        dtypes; IndexError for a target that is not a class (on CUDA the kernel aborts); RuntimeError if the requested
        implementation does not support the case.
    """
    return OPERATOR(logits, targets, ignore_index, label_smoothing, impl=impl)
