"""Gradients of single examples, where they are small: dots_n = <G_n, V>, weighted gradient sum_n w_n G_n.

A record has them in place of A and B (`folded`): of normalisations in any pass that keeps records, of other layers,
where that is cheaper, in passes that answer several times, as for a virtual step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from metakern.capture.record import Record
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights

LARGEST_SHARE = 2
"""How large they may be beside A and B. Larger ones are bound by memory, as long as examples have few positions."""


def cheaper(weight: Tensor, inputs: Tensor, grad: Tensor, examples: int) -> bool:
    """Are the gradients of single examples in a weight small beside A and B? On a GPU nothing was measured."""
    if grad.is_cuda or grad.dtype not in (torch.float32, torch.float64):
        return False
    return weight.numel() * examples <= LARGEST_SHARE * (inputs.numel() + grad.numel())


def along(gradients: Mapping[int, Tensor], tangents: Tangents) -> Tensor:
    """sum over parameters of <G_n, V>, [n], for gradients [n, numbers]."""
    terms = [torch.mv(grads, tangents[p].to(grads.dtype).flatten()) for p, grads in gradients.items() if p in tangents]
    return sum(terms[1:], terms[0])


def weighted(gradients: Mapping[int, Tensor], weights: Weights) -> Gradients:
    """sum_n w_n G_n by parameter, [numbers]; examples of weight zero are not read where the host knows them."""
    w, found = weights.values, {}
    for p, grads in gradients.items():
        rows = w.to(grads.dtype)
        if weights.kept is not None:
            grads, rows = grads.index_select(0, weights.kept), rows.index_select(0, weights.kept)
        found[p] = torch.mv(grads.t(), rows)
    return found


class Folded(NamedTuple):
    """Stands for the function of a call whose record is folded, and names the rule that formed its gradients."""

    rule: LayerRule


def folded(record: Record, gradients: Mapping[int, Tensor], rule: LayerRule) -> Record:
    """The record with gradients of single examples, [n, numbers] by parameter, in place of A and B."""
    call = record.call.without_arguments()._replace(func=Folded(rule))
    return replace(record, use=record.use._replace(call=call), output_grads=(), gradients=gradients)


def _shaped(record: Record, weights: Weights) -> Gradients:
    """As the parameters are: where one is used several times other uses of it add to this."""
    found = weighted(record.gradients, weights)
    return {id(p): found[id(p)].view_as(p) for _, p in record.call.parameters}


RULE = LayerRule(
    applies=lambda call: True,
    dots=lambda record, tangents, examples: along(record.gradients, tangents),
    weighted_grads=_shaped,
    fresh=True,
)
"""Of folded records."""
