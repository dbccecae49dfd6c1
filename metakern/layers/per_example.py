"""Per-example gradients, where they are small: dots_n = <G_n, V>, weighted gradient sum_n w_n G_n.

A record holds them instead of A and B (`folded`): for normalisations in every pass that keeps records; for other
layers, if that is cheaper, in passes that answer several times, as for a virtual step.
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
"""How large they may be relative to A and B. Larger ones are memory-bound, as long as examples have few positions."""


def cheaper(weight: Tensor, inputs: Tensor, grad: Tensor, examples: int) -> bool:
    """Whether per-example gradients of a weight are small compared with A and B. On a GPU nothing was measured."""
    if grad.is_cuda or grad.dtype not in (torch.float32, torch.float64):
        return False
    return weight.numel() * examples <= LARGEST_SHARE * (inputs.numel() + grad.numel())


def along(gradients: Mapping[int, Tensor], tangents: Tangents) -> Tensor:
    """sum over parameters of <G_n, V>, [n], for gradients [n, numbers]."""
    terms = [torch.mv(grads, tangents[p].to(grads.dtype).flatten()) for p, grads in gradients.items() if p in tangents]
    return sum(terms[1:], terms[0])


def weighted(gradients: Mapping[int, Tensor], weights: Weights) -> Gradients:
    """sum_n w_n G_n by parameter, [numbers]; examples of weight zero are not read if the host knows them."""
    w, found = weights.values, {}
    for p, grads in gradients.items():
        rows = w.to(grads.dtype)
        if weights.kept is not None:
            grads, rows = grads.index_select(0, weights.kept), rows.index_select(0, weights.kept)
        found[p] = torch.mv(grads.t(), rows)
    return found


class Folded(NamedTuple):
    """Replaces the function of a call whose record is folded, and names the rule that formed its gradients."""

    rule: LayerRule


def folded(record: Record, gradients: Mapping[int, Tensor], rule: LayerRule) -> Record:
    """The record with per-example gradients, [n, numbers] by parameter, instead of A and B."""
    call = record.call.without_arguments()._replace(func=Folded(rule))
    return replace(record, use=record.use._replace(call=call), output_grads=(), gradients=gradients)


def _shaped(record: Record, weights: Weights) -> Gradients:
    """In the shapes of the parameters: if one is used several times, other uses add to this."""
    found = weighted(record.gradients, weights)
    return {id(p): found[id(p)].view_as(p) for _, p in record.call.parameters}


RULE = LayerRule(
    applies=lambda call: True,
    dots=lambda record, tangents, examples: along(record.gradients, tangents),
    weighted_grads=_shaped,
    fresh=True,
)
"""The rule of folded records."""
