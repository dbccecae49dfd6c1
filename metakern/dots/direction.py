"""Direction form: dots_n = sum over uses of <B_n, d output_n / d parameters . V>, with V the meta gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from metakern.capture.record import Call, Record
from metakern.layers import per_example
from metakern.layers.precision import products
from metakern.layers.replay import output_tangents
from metakern.layers.rule import Tangents
from metakern.layers.table import rule_for


def extend_to_derived(tangents: Mapping[int, Tensor], derivations: Iterable[Call]) -> Tangents:
    """Directions in tensors derived from parameters (transposes, normalised weights, slices), by the chain rule."""
    known = dict(tangents)
    for call in derivations:
        if any(id(parameter) in known for _, parameter in call.parameters):
            for tensor, tangent in zip(call.outputs, output_tangents(call, known)):
                if tensor is not None and tangent is not None:
                    known[id(tensor)] = tangent
    return known


def direction_dots(record: Record, tangents: Tangents, examples: int) -> Tensor | None:
    """The contribution of one use to the dots, [n]; None if no parameter of the use has a direction."""
    if not any([id(parameter) in tangents for _, parameter in record.call.parameters]):
        return None
    with products(record.dot_precision):
        return rule_for(record.call).dots(record, tangents, examples)


def folded(record: Record, examples: int) -> Record:
    """The record with per-example gradients instead of A and B, if its layer forms them."""
    rule = rule_for(record.call)
    gradients = None if rule.per_example is None else rule.per_example(record, examples)
    return record if gradients is None else per_example.folded(record, gradients, rule)
