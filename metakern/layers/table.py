"""Which rule serves which call; `register_layer` adds to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
    convolution,
    einsum,
    embedding,
    generic,
    linear,
    matrix_product,
    norm,
    per_example,
    scale,
    sparse_product,
)
from metakern.layers.rule import LayerRule

_BY_FUNCTION: dict[Callable[..., Any], LayerRule] = {
    F.linear: linear.RULE,
    **dict.fromkeys((*matrix_product.PRODUCTS, *matrix_product.SUMS), matrix_product.RULE),
    torch.conv1d: convolution.RULE,
    torch.conv2d: convolution.RULE,
    torch.conv3d: convolution.RULE,
    F.embedding: embedding.RULE,
    F.embedding_bag: bag.RULE,
    **{function: norm.RULE for function in norm.NORMS},
    **dict.fromkeys(scale.PRODUCTS, scale.RULE),
    torch.einsum: einsum.RULE,
}
_OF_SPARSE_INPUTS: dict[Callable[..., Any], LayerRule] = dict.fromkeys(sparse_product.FUNCTIONS, sparse_product.RULE)

_BY_MODULE: dict[type[nn.Module], LayerRule] = {}


def rule_for(call: Call) -> LayerRule:
    """The rule of a call; calls without one are served by forward mode through the call alone."""
    if isinstance(call.func, per_example.Folded):
        return per_example.RULE
    if isinstance(call.func, RealParts):
        rule = einsum.RULE if call.func.func is torch.einsum else None
    elif isinstance(call.func, ModuleCall):
        kinds = type(call.func.module).__mro__
        rule = next((_BY_MODULE[kind] for kind in kinds if kind in _BY_MODULE), None)
    elif call.name in ADDITIONS:
        rule = addition.RULE
    else:
        rule = _BY_FUNCTION.get(call.func)
    if rule is not None and rule.applies(call):
        return rule
    sparse = _OF_SPARSE_INPUTS.get(call.func)
    return sparse if sparse is not None and sparse.applies(call) else generic.RULE


def register_layer(layer: type[nn.Module] | Callable[..., Any], rule: LayerRule | None = None) -> None:
    """Serve a layer by a rule of its own, or trace a module as a whole.

    Most layers need none of this: whatever is made of torch functions is traced and exact. Register a module type when
    its inside cannot be traced (a custom autograd.Function, a scripted part), or a function or module type for speed.

    Args:
        layer: a subclass of nn.Module, or a torch function as a trace sees it (`torch.nn.functional.linear`).
        rule: a `LayerRule`. In `record.call` a module has its inputs as arguments and its parameters as keywords
            "parameter:NAME". None, for modules only: forward mode through the module's own forward for the dots, or two
            reversals where an operation has no forward mode; one vector-Jacobian product for the gradient.

    Raises:
        TypeError: `layer` is neither, or `rule` is no LayerRule.
    """
    if rule is not None and not isinstance(rule, LayerRule):
        raise TypeError(f"rule must be a metakern.LayerRule or None, got {type(rule).__name__}")
    if isinstance(layer, type) and issubclass(layer, nn.Module):
        _BY_MODULE[layer] = generic.RULE if rule is None else rule
        REGISTERED.add(layer)
    elif callable(layer) and not isinstance(layer, type) and rule is not None:
        _BY_FUNCTION[layer] = rule
    else:
        raise TypeError(f"layer must be a module type, or a function together with a rule; got {layer!r}")
