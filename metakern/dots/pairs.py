"""Pairs form: dots_n = (1/m) sum_j sum_ts (A_nt . A'_js)(B_nt . B'_js), without the direction V of that weight.

It is cheaper than the direction form when the meta batch has few positions. It needs a weight that is used exactly
once in either pass: a weight used k times has k x k cross terms, which the direction form carries by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from metakern import ops
from metakern.capture.examples import ExampleAxis
from metakern.capture.record import Record, Trace, Use, place_of
from metakern.layers.linear import matrices
from metakern.layers.precision import lowered, products
from metakern.layers.table import rule_for


def pairable(trace: Trace, chosen: Mapping[int, Tensor]) -> dict[int, int]:
    """identity of a weight -> index of its only use, for weights that the pairs form may serve."""
    uses = Counter(id(parameter) for use in trace.uses for _, parameter in use.call.parameters)
    for call in trace.derivations:
        uses.update(2 * [id(parameter) for _, parameter in call.parameters])  # never once
    found = {}
    for k, use in enumerate(trace.uses):
        weight = use.call.parameter(1, "weight")
        usable = weight is not None and id(weight) in chosen and uses[id(weight)] == 1
        usable = usable and trace.hooked.isdisjoint(map(place_of, use.edges))
        if usable and rule_for(use.call).matrices is not None:
            found[id(weight)] = k
    return found


def pairs_are_cheaper(use: Use, meta_use: Use, directions: int = 1) -> bool:
    """Compare multiplications: n t s (i + o) for the Grams, (d n t + s) i o for d directions V and the products with A.

    There is one direction, of the mean meta loss, or one of every meta example.
    """
    rows = use.output_shapes[0][:-1].numel()
    meta_rows = meta_use.output_shapes[0][:-1].numel()
    outputs, inputs = use.call.argument(1, "weight").shape
    return rows * meta_rows * (inputs + outputs + GRAM_OVERHEAD) < (directions * rows + meta_rows) * inputs * outputs


# The two Grams are written, multiplied and summed: memory traffic worth about this many multiplications an entry.
GRAM_OVERHEAD = 64


def of_example(record: Record, examples: int, j: int) -> Record:
    """What the pairs form reads of one meta example, whose B' is of its own loss."""
    a, b = matrices(record, examples)
    call = record.call._replace(args=(a[j],), kwargs={}, parameters=(), versions=())
    return Record(record.use._replace(call=call), (b[j],), (ExampleAxis(0, 1, len(b[j])),))


def pair_dots(record: Record, meta_record: Record, examples: int) -> Tensor:
    """The contribution of one weight to the dots, [n]; B' is of the mean meta loss, 1/m included, or of one loss."""
    a, b = matrices(record, examples)
    meta_a, meta_b = matrices(meta_record, 1)
    operands = a, b, meta_a.reshape(-1, a.shape[-1]).to(a.dtype), meta_b.reshape(-1, b.shape[-1]).to(b.dtype)
    with products(record.dot_precision):
        rows = ops.pair_dots(*lowered(record.dot_precision, *operands))
    axis = record.axes[0]
    return rows if axis.leading else axis.total(rows.view(record.output_grad.shape[:-1]), examples)
