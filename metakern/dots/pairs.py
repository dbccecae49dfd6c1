"""Pairs form: dots_n = (1/m) sum_j sum_ts (A_nt . A'_js)(B_nt . B'_js), without the direction V of that weight.

It is cheaper than the direction form if the meta batch has few positions. It needs a weight that is used exactly once
in each pass: a weight used k times has k x k cross terms, which the direction form includes automatically. For each
meta example separately, [n, m], the bias next to the weight is included: (sum_t B_nt) . (sum_s B'_js).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from metakern import ops
from metakern.capture.record import Record, Trace, Use, place_of
from metakern.layers.linear import matrices
from metakern.layers.precision import lowered, products
from metakern.layers.table import rule_for


def pairable(trace: Trace, chosen: Mapping[int, Tensor]) -> dict[int, int]:
    """identity of a weight -> index of its only use, for weights that the pairs form can handle."""
    uses = _times_used(trace)
    found = {}
    for k, use in enumerate(trace.uses):
        weight = use.call.parameter(1, "weight")
        usable = weight is not None and id(weight) in chosen and uses[id(weight)] == 1
        usable = usable and trace.hooked.isdisjoint(map(place_of, use.edges))
        if usable and rule_for(use.call).matrices is not None:
            found[id(weight)] = k
    return found


def pairable_biases(trace: Trace, weights: Mapping[int, int]) -> dict[int, Tensor]:
    """identity of a `pairable` weight -> the bias next to it, if that is used nowhere else either."""
    uses = _times_used(trace)
    found = {key: trace.uses[k].call.parameter(2, "bias") for key, k in weights.items()}
    return {key: bias for key, bias in found.items() if bias is not None and uses[id(bias)] == 1}


def _times_used(trace: Trace) -> Counter[int]:
    uses = Counter(id(parameter) for use in trace.uses for _, parameter in use.call.parameters)
    for call in trace.derivations:
        uses.update(2 * [id(parameter) for _, parameter in call.parameters])  # so never only once
    return uses


def pairs_are_cheaper(use: Use, meta_use: Use, directions: int = 1) -> bool:
    """Whether pairs take fewer multiplications than directions: one for the mean meta loss, or one per meta example."""
    return _saved(use, _positions(meta_use), directions) > 0


def worth_tracing(trace: Trace, candidates: Iterable[int], share: float) -> bool:
    """Whether pairs save more, over all uses that they can handle, than tracing the meta batch for them costs.

    `share` is the size of the meta batch relative to the batch, from which its positions are estimated.
    """
    uses = [trace.uses[k] for k in candidates]
    saved = sum(max(0.0, _saved(use, share * _positions(use))) for use in uses)
    return saved > TRACED_USE * len(trace.uses)


def _saved(use: Use, meta_rows: float, directions: int = 1) -> float:
    """Multiplications: (d n t + s) i o for d directions V and the products with A, less n t s (i + o) for the Grams."""
    rows = _positions(use)
    outputs, inputs = use.call.argument(1, "weight").shape
    return (directions * rows + meta_rows) * inputs * outputs - rows * meta_rows * (inputs + outputs + GRAM_OVERHEAD)


def _positions(use: Use) -> int:
    """Positions of all examples of the batch together."""
    return use.output_shapes[0][:-1].numel()


# The two Grams are written, multiplied and summed: memory traffic worth about this many multiplications an entry.
GRAM_OVERHEAD = 64

TRACED_USE = 1 << 22
"""Multiplications that take about as long as tracing one use of the meta batch, overhead included: 50 to 90 us on the
CPU of docs/measured-facts.md."""


def pair_dots(record: Record, meta_record: Record, examples: int, meta_examples: int = 0) -> Tensor:
    """The contribution of one weight to the dots, [n]; B' belongs to the mean meta loss, 1/m included.

    If the number of meta examples is given, dots with each of them, [n, m]: B' belongs to their separate losses, and a
    bias that is a parameter of the meta record counts as well.
    """
    a, b = matrices(record, examples)
    meta_a, meta_b = (x.to(a.dtype) for x in matrices(meta_record, max(1, meta_examples)))
    if not meta_examples:
        meta_a, meta_b = meta_a.flatten(0, 1), meta_b.flatten(0, 1)
    with products(record.dot_precision):
        dots = ops.pair_dots(*lowered(record.dot_precision, a, b, meta_a, meta_b))
    if meta_examples and meta_record.call.parameter(2, "bias") is not None:
        dots.addmm_(b.sum(1, dtype=dots.dtype), meta_b.sum(1, dtype=dots.dtype).t())
    axis = record.axes[0]
    if axis.leading:
        return dots
    rows = dots.view(*record.output_grad.shape[:-1], *dots.shape[1:])
    if not meta_examples:
        return axis.total(rows, examples)
    return torch.stack([axis.total(column, examples) for column in rows.unbind(-1)], 1)
