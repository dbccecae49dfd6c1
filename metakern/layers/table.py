"""Which rule serves which call; `register_layer` adds to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from metakern.capture.record import Call
from metakern.capture.trace import ADDITIONS
from metakern.layers import addition, bag, convolution, embedding, generic, linear, norm
from metakern.layers.rule import LayerRule

_BY_FUNCTION: dict[Callable[..., Any], LayerRule] = {
    F.linear: linear.RULE,
    torch.conv1d: convolution.RULE,
    torch.conv2d: convolution.RULE,
    torch.conv3d: convolution.RULE,
    F.embedding: embedding.RULE,
    F.embedding_bag: bag.RULE,
    **{function: norm.RULE for function in norm.NORMS},
}


def rule_for(call: Call) -> LayerRule:
    """The rule of a call; calls without one are served by forward mode through the call alone."""
    rule = addition.RULE if call.name in ADDITIONS else _BY_FUNCTION.get(call.func)
    if rule is not None and rule.applies(call):
        return rule
    return generic.RULE


def register_layer(function: Callable[..., Any], rule: LayerRule) -> None:
    """Serve calls of a torch function by `rule` instead of forward mode through the call.

    Args:
        function: what the trace sees: a torch function (`torch.nn.functional.linear`) or a Tensor method.
        rule: a `LayerRule`; see docs/adding-a-layer.md.

    Raises:
        TypeError: `function` is not callable or `rule` is no LayerRule.
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    if not isinstance(rule, LayerRule):
        raise TypeError(f"rule must be a metakern.layers.LayerRule, got {type(rule).__name__}")
    _BY_FUNCTION[function] = rule
