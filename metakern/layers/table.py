"""Which rule handles which call; `register_layer` adds to the table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

from metakern.capture.module_call import ModuleCall
from metakern.capture.real_parts import RealParts
from metakern.capture.record import Call
from metakern.capture.trace import ADDITIONS
from metakern.capture.whole_modules import REGISTERED
from metakern.layers import (
    addition,
    bag,
    contraction,
    convolution,
    embedding,
    generic,
    linear,
    matrix_product,
    norm,
    per_example,
    prelu,
    recurrent,
    scale,
    sparse_product,
)
from metakern.layers.rule import LayerRule

_RULES: list[tuple[Collection[Callable[..., Any]], LayerRule]] = [
    ((F.linear,), linear.RULE),
    ((*matrix_product.PRODUCTS, *matrix_product.SUMS), matrix_product.RULE),
    ((*convolution.PLAIN, *convolution.TRANSPOSED), convolution.RULE),
    ((F.embedding,), embedding.RULE),
    ((F.embedding_bag,), bag.RULE),
    (norm.NORMS, norm.RULE),
    (recurrent.FUNCTIONS, recurrent.RULE),
    (prelu.FUNCTIONS, prelu.RULE),
    (scale.PRODUCTS, scale.RULE),
    (sparse_product.FUNCTIONS, sparse_product.RULE),
    (contraction.FUNCTIONS, contraction.RULE),
]
"""If a function has several rules, the first that applies to a call handles it."""

_BY_FUNCTION: dict[Callable[..., Any], tuple[LayerRule, ...]] = {
    function: tuple(rule for theirs, rule in _RULES if function in theirs)
    for functions, _ in _RULES
    for function in functions
}
_BY_MODULE: dict[type[nn.Module], LayerRule] = {}

REGISTRATIONS: list[tuple[Any, LayerRule | None]] = []
"""What users have registered so far: with each, what was found out about a model before is out of date."""


def rule_for(call: Call) -> LayerRule:
    """The rule of a call; calls without one are handled by forward mode through the call alone."""
    for rule in _rules_for(call):
        if rule.applies(call):
            return rule
    return generic.RULE


def _rules_for(call: Call) -> Sequence[LayerRule]:
    if isinstance(call.func, per_example.Folded):
        return (per_example.RULE,)
    if isinstance(call.func, recurrent.Opened):
        return (recurrent.OPENED,)
    if isinstance(call.func, RealParts):
        return (contraction.RULE,) if call.func.func in contraction.FUNCTIONS else ()
    if isinstance(call.func, ModuleCall):
        return [_BY_MODULE[kind] for kind in type(call.func.module).__mro__ if kind in _BY_MODULE][:1]
    if call.name in ADDITIONS:
        return (addition.RULE,)
    return _BY_FUNCTION.get(call.func, ())


def register_layer(layer: type[nn.Module] | Callable[..., Any], rule: LayerRule | None = None) -> None:
    """Handle a layer by a custom rule, or treat a module as one unit.

    Most layers do not need this: anything made of torch functions is traced and exact. Register a module type if it
    cannot be traced inside (a custom autograd.Function, a scripted part), or a function or module type for speed.

    Args:
        layer: a subclass of nn.Module, or a torch function as a trace sees it (`torch.nn.functional.linear`).
        rule: a `LayerRule`. In `record.call`, a module has its inputs as arguments and its parameters as keywords
            "parameter:NAME". None, for modules only: forward mode through the module's forward for the dots, or two
            backward passes where an operation has no forward mode; one vector-Jacobian product for the gradient.

    Raises:
        TypeError: `layer` is neither, or `rule` is not a LayerRule.
    """
    if rule is not None and not isinstance(rule, LayerRule):
        raise TypeError(f"rule must be a metakern.LayerRule or None, got {type(rule).__name__}")
    if isinstance(layer, type) and issubclass(layer, nn.Module):
        _BY_MODULE[layer] = generic.RULE if rule is None else rule
        REGISTERED.add(layer)
    elif callable(layer) and not isinstance(layer, type) and rule is not None:
        _BY_FUNCTION[layer] = (rule,)
    else:
        raise TypeError(f"layer must be a module type, or a function together with a rule; got {layer!r}")
    REGISTRATIONS.append((layer, rule))
