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
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of every row and its gradient in the logits, together.

    `loss_r = log sum_c exp(z_rc) - (1 - e) z_ry - (e / C) sum_c z_rc` and
    `grad_rc = softmax(z_r)_c - (1 - e) [c == y] - e / C`; both zero where y is `ignore_index`.

    Args:
        logits: z [r, C], any floating dtype.
        targets: y [r], int64, in [0, C) or `ignore_index`.
        label_smoothing: e, in [0, 1].
        impl: None takes the first implementation that supports the case; a name never falls back.
    Returns: losses [r] in float32, or float64 for float64 logits; grad [r, C] in the dtype of the logits, the
        gradient of the summed losses.
    Raises: ValueError for shapes, devices, an unknown `impl` or logits that require grad; TypeError for dtypes;
        IndexError for a target that is no class (on CUDA the kernel stops); RuntimeError if the implementation asked
        for does not support the case.
    """
    return OPERATOR(logits, targets, ignore_index, label_smoothing, impl=impl)
