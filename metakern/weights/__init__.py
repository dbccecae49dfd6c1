"""Stage 3: dots -> weights. Small pure rules; any function [n] -> [n] can be used as a rule.

reweight_step(model, batch, meta_batch, rule="clip_normalise")
reweight_step(model, batch, meta_batch, rule=functools.partial(weights.softmax, temperature=0.1))
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from metakern.weights.rules import clip_normalise as clip_normalise
from metakern.weights.rules import floor as floor
from metakern.weights.rules import softmax as softmax
from metakern.weights.rules import top_k as top_k
from metakern.weights.rules import unclipped as unclipped

WeightRule = Callable[[Tensor], Tensor]

# What `rule=` accepts by name: rules that need nothing but the dots. top_k has no default k that fits every batch.
RULES: dict[str, WeightRule] = {
    "clip_normalise": clip_normalise,
    "floor": floor,
    "softmax": softmax,
    "unclipped": unclipped,
}


def weight_rule(rule: str | WeightRule) -> WeightRule:
    """The rule of that name, or the function itself, which gets a copy of the dots that it may write into."""
    if callable(rule):
        return lambda dots: rule(dots.clone())
    if rule not in RULES:
        raise ValueError(f"rule must be one of {sorted(RULES)} or a function of the dots, got {rule!r}")
    return RULES[rule]


def apply_rule(rule: WeightRule, dots: Tensor) -> Tensor:
    """Weights [n] by a rule, checked and converted to the dtype of the dots (a rule may return a mask, `dots > 0`)."""
    weights = rule(dots)
    if not isinstance(weights, Tensor) or weights.shape != dots.shape:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"rule must return one weight per example, shape {tuple(dots.shape)}; got {got}")
    return weights.detach().to(dots.dtype)
