"""clip_normalise: the public function and its table of implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops.clip_normalise import contract, native, reference
from metakern.ops.select import Implementation, Operator, always

OPERATOR = Operator(
    contract,
    table=(
        Implementation("native", native.clip_normalise, native.supports),
        Implementation("reference", reference.clip_normalise, always),
    ),
)


def clip_normalise(dots: Tensor, *, impl: str | None = None) -> Tensor:
    """The weights of learning to reweight: negative dots become zero, the rest are scaled to sum to one.

    `w_n = max(d_n, 0) / (D + [D == 0])`, D = sum_k max(d_k, 0). Without a positive dot all weights are zero; NaN stays
    NaN.

    Args:
        dots: [n], any floating dtype, any stride.
        impl: None uses the first implementation that supports the case; a name never falls back.
    Returns: weights [n] in the dtype of `dots`, summed in float32, or float64 for float64.
    Raises: ValueError for shapes, an unknown `impl` or dots that require grad; TypeError for dtypes;
        RuntimeError if the requested implementation does not support the case.
    Source: Ren et al., Learning to Reweight Examples for Robust Deep Learning, ICML 2018, algorithm 1, line 11.
    """
    return OPERATOR(dots, impl=impl)
