"""cross_entropy_rows_backward: the public function and its table of implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops.cross_entropy_rows.native import supports
from metakern.ops.cross_entropy_rows_backward import contract, native, reference
from metakern.ops.select import Implementation, Operator, always

OPERATOR = Operator(
    contract,
    table=(
        Implementation("native", native.cross_entropy_rows_backward, supports),
        Implementation("reference", reference.cross_entropy_rows_backward, always),
    ),
)


def cross_entropy_rows_backward(
    logits: Tensor,
    targets: Tensor,
    highs: Tensor,
    sums: Tensor,
    grad: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Gradient of `sum_r grad_r losses_r` with respect to the logits, reading and writing each of them once.

    `out_rc = grad_r (exp(z_rc - highs_r) / sums_r - (1 - s) [c = y] - s / C)` with smoothing s, 0 where y is
    `ignore_index`.

    Args:
        logits, targets, ignore_index, label_smoothing, impl: as for `cross_entropy_rows`.
        highs, sums: as `cross_entropy_rows` returned them, [r].
        grad: [r], float32, or float64 for float64 logits.
    Returns: [r, C], in the dtype of the logits.
    Raises: as `cross_entropy_rows`; for a target that is not a class, the reference raises a RuntimeError.
    """
    return OPERATOR(logits, targets, highs, sums, grad, ignore_index, label_smoothing, impl=impl)
