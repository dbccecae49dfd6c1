"""Bags of table rows, torch.nn.functional.embedding_bag: sums and means are linear in the table, maxima are not."""

from __future__ import annotations

from metakern.capture.record import Call
from metakern.capture.refusal import EngineUnavailable
from metakern.layers import generic
from metakern.layers.rule import LayerRule


def _applies(call: Call) -> bool:
    if call.argument(3, "max_norm") is not None:
        raise EngineUnavailable("an embedding bag with max_norm rewrites its weight in the forward pass")
    return call.argument(6, "mode", "mean") != "max"


RULE = LayerRule(_applies, generic.linear_dots, generic.weighted_grads)
