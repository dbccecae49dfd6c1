"""Matrix arithmetic: the operators that dots and weighted gradient are made of.

One folder per operator: `contract` (schema, checks, shapes, FLOPs), `reference` (the truth), `native` and `triton` (the
fast ones), `api` (the documented function and the table of implementations). Operators know nothing about models.
"""

from metakern.ops.affine_grads.api import affine_grads
from metakern.ops.clip_normalise.api import clip_normalise
from metakern.ops.cross_entropy_rows.api import cross_entropy_rows
from metakern.ops.cross_entropy_rows_backward.api import cross_entropy_rows_backward
from metakern.ops.direction_dots.api import direction_dots
from metakern.ops.embedding_dots.api import embedding_dots
from metakern.ops.kernel_grads.api import kernel_grads
from metakern.ops.pair_dots.api import pair_dots
from metakern.ops.row_dots.api import row_dots
from metakern.ops.weighted_grad.api import weighted_grad
from metakern.ops.weighted_kernel_grad.api import weighted_kernel_grad

__all__ = [
    "affine_grads",
    "clip_normalise",
    "cross_entropy_rows",
    "cross_entropy_rows_backward",
    "direction_dots",
    "embedding_dots",
    "kernel_grads",
    "pair_dots",
    "row_dots",
    "weighted_grad",
    "weighted_kernel_grad",
]
