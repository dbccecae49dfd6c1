"""Recurrent layers and cells, treated as two linear layers: X W^T of the inputs and H U^T of the previous states.

A pass gives B of the layer's outputs only. Repeating the layer step by step gives the output gradients of both products
(`layers/recurrence.py`), for all steps at once:

dots_n = sum_t <B_nt, V A_nt + v> over the products;  weighted gradient sum_nt w_n B_nt A_nt^T and sum_nt w_n B_nt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern import ops
from metakern.capture.independence.examples import ExampleAxis
from metakern.capture.record import Call, Record
from metakern.capture.repeatable import RECURRENT
from metakern.layers import generic, recurrence
from metakern.layers.linear import bias_dots, bias_gradient
from metakern.layers.precision import direction_dots
from metakern.layers.replay import as_recorded
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights

CELLS = (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
FUNCTIONS = (*RECURRENT, *CELLS)


class _Product(NamedTuple):
    """A product with its output gradient: rows, steps, numbers."""

    inputs: Tensor  # A, [r, t, i]
    grads: Tensor  # B, [r, t, o]
    weight: Tensor
    bias: Tensor | None


class Opened(NamedTuple):
    """Replaces the function of a call whose record consists of these products."""

    products: tuple[_Product, ...]


class _Layer(NamedTuple):
    """Weights of one layer, by direction."""

    w: list[Tensor]
    u: list[Tensor]
    b: list[Tensor]  # empty without biases
    c: list[Tensor]


class _Settings(NamedTuple):
    """The arguments of a call: a sequence [t, r, i], initial states [layers * d, r, k] each, and weights."""

    kind: str  # "rnn_tanh", "rnn_relu", "lstm" or "gru"
    x: Tensor
    before: tuple[Tensor, ...]
    layers: list[_Layer]
    directions: int
    rows_at: int  # the dimension of its output along which the rows are
    dropout: float = 0.0  # between layers


def _settings(call: Call) -> _Settings | None:
    """None for packed or unbatched sequences, `proj_size`, and keyword arguments."""
    if call.kwargs or not isinstance(call.args[0], Tensor):
        return None
    return _of_cell(call) if call.func in CELLS else _of_layer(call)


def _of_cell(call: Call) -> _Settings | None:
    x, hidden, *weights = call.args
    flat = [w for w in weights if w is not None]
    layers = _layers(flat, 1, len(flat) == 4, 1)
    if layers is None or x.dim() != 2:
        return None
    before = tuple(state.unsqueeze(0) for state in _states(hidden))
    return _Settings(call.func.__name__.removesuffix("_cell"), x.unsqueeze(0), before, layers, 1, 0)


def _of_layer(call: Call) -> _Settings | None:
    x, hidden, flat, biases, count, dropout, training, bidirectional, *batch_first = call.args
    if not isinstance(flat, (list, tuple)) or x.dim() != 3:
        return None
    directions, first = 1 + bool(bidirectional), batch_first == [True]
    layers = _layers(list(flat), count, biases, directions)
    if layers is None:
        return None
    x = x.transpose(0, 1) if first else x
    rate = dropout if training and count > 1 else 0.0
    return _Settings(call.func.__name__, x, _states(hidden), layers, directions, 0 if first else 1, rate)


def _states(hidden: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)


def _layers(flat: list[Tensor], count: int, biases: bool, directions: int) -> list[_Layer] | None:
    each = 4 if biases else 2
    if len(flat) != each * count * directions:
        return None
    per_layer = [flat[k * each * directions : (k + 1) * each * directions] for k in range(count)]
    return [_Layer(*(theirs[place::each] if place < each else [] for place in range(4))) for theirs in per_layer]


def _applies(call: Call) -> bool:
    """Inputs and initial states are data."""
    return _settings(call) is not None and all(path.key != 1 and path.key != 0 for path, _ in call.parameters)


def opened(record: Record) -> Record:
    """The record of the products, by rows; the record itself if rows do not lie along the batch dimension."""
    found = _settings(record.call)
    assert found is not None
    whole = record.call.func not in CELLS
    rows_at = [found.rows_at if whole and place == 0 else int(whole) for place in record.use.output_places]
    known = [(axis, dim) for axis, dim in zip(record.axes, rows_at) if axis is not None]
    kinds = {(axis.outer, axis.inner) for axis, _ in known}
    if len(kinds) > 1 or any(axis.dim != dim for axis, dim in known):
        return record
    grads = dict(zip(record.use.output_places, record.output_grads))
    with torch.no_grad(), as_recorded(record.call), torch.autocast(found.x.device.type, enabled=False):
        products = tuple(_products(found, _Given(found, grads, whole)))
    call = record.call.without_arguments()._replace(func=Opened(products), versions=record.call.versions)
    (outer, inner), use = kinds.pop(), record.use._replace(call=call)
    return replace(record, use=use, output_grads=(products[0].grads,), axes=(ExampleAxis(0, outer, inner),))


class _Given:
    """The tensors of a call and the gradients of its outputs (zeros if there are none), in at least float32."""

    def __init__(self, found: _Settings, grads: dict[int, Tensor | None], whole: bool) -> None:
        dtype = torch.promote_types(found.layers[0].w[0].dtype, torch.float32)
        self.x, self.before = found.x.to(dtype).contiguous(), [state.to(dtype) for state in found.before]
        self.layers = [_Layer(*([w.to(dtype) for w in each] for each in layer)) for layer in found.layers]
        steps, rows, width = *found.x.shape[:2], found.before[0].shape[-1] * found.directions
        last = [grads.get(place + whole) for place in range(len(found.before))]
        if not whole:
            last = [None if g is None else g.unsqueeze(0) for g in last]
        self.last = [torch.zeros_like(b) if g is None else g.to(dtype) for g, b in zip(last, self.before)]
        outer = grads.get(0) if whole else None
        if outer is None:
            self.outer = self.x.new_zeros(steps, rows, width)
        else:
            self.outer = (outer if found.rows_at == 1 else outer.transpose(0, 1)).to(dtype)


def _products(found: _Settings, given: _Given) -> Iterator[_Product]:
    """Run forwards through all layers, then backwards, and yield the products of each."""
    d, x, passed, noise = found.directions, given.x, [], []
    for place, layer in enumerate(given.layers):
        if place and found.dropout:
            noise.append(F.dropout(torch.ones_like(x), found.dropout))  # the mask of the call itself
            x = x * noise[-1]
        inputs = torch.stack([x, x.flip(0)][:d])
        states = [state[place * d : (place + 1) * d] for state in given.before]
        steps = _steps(found.kind, inputs, layer, states)
        passed.append((inputs, states[0], steps))
        x = torch.cat([steps.hidden[0], *(h.flip(0) for h in steps.hidden[1:])], -1)
    outer = given.outer
    for place in reversed(range(len(passed))):
        (inputs, start, steps), theirs = passed[place], found.layers[place]
        parts = outer.chunk(d, -1)
        last = [state[place * d : (place + 1) * d] for state in given.last]
        of_inputs, of_hidden = steps.back(torch.stack([parts[0], *(p.flip(0) for p in parts[1:])]), last[0], last[-1])
        hidden = torch.cat([start.unsqueeze(1), steps.hidden[:, :-1]], 1)
        for k in range(d):
            for a, b, weights, biases in (
                (inputs, of_inputs, theirs.w, theirs.b),
                (hidden, of_hidden, theirs.u, theirs.c),
            ):
                yield _Product(a[k].transpose(0, 1), b[k].transpose(0, 1), weights[k], biases[k] if biases else None)
        if place:
            below = (of_inputs.flatten(1, 2) @ torch.stack(given.layers[place].w)).view(*of_inputs.shape[:3], -1)
            outer = below[0] + below[1].flip(0) if d == 2 else below[0]
            outer = outer * noise.pop() if noise else outer


def _steps(kind: str, inputs: Tensor, layer: _Layer, states: list[Tensor]) -> recurrence.Steps:
    w, u = torch.stack(layer.w), torch.stack(layer.u)
    p = (inputs.flatten(1, 2) @ w.mT).view(*inputs.shape[:3], -1)
    b, c = (torch.stack(each)[:, None, None] if each else p.new_zeros(()) for each in (layer.b, layer.c))
    if kind == "gru":
        return recurrence.gru(p + b, u, (c + p.new_zeros(len(u), 1, 1, u.shape[1]))[:, 0], states[0])
    if kind == "lstm":
        return recurrence.lstm(p + b + c, u, states[0], states[1])
    return recurrence.rnn(p + b + c, u, states[0], relu=kind == "rnn_relu")


RULE = LayerRule(_applies, generic.dots, generic.weighted_grads, opened=opened)


def _dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    terms = []
    for a, b, weight, bias in record.call.func.products:  # type: ignore[attr-defined]
        if id(weight) in tangents:
            terms.append(direction_dots(record.dot_precision, a, tangents[id(weight)].to(a.dtype), b))
        if bias is not None and id(bias) in tangents:
            terms.append(bias_dots(b, tangents[id(bias)]))
    return record.axes[0].total(sum(terms[1:], terms[0]), examples)


def _weighted_grads(record: Record, weights: Weights) -> Gradients:
    trained, found = {id(p) for _, p in record.call.parameters}, Gradients()
    w = record.axes[0].spread(weights.values, record.output_grad.shape[:1])

    def add(tensor: Tensor, gradient: Tensor) -> None:
        found[id(tensor)] = found[id(tensor)] + gradient if id(tensor) in found else gradient

    for a, b, weight, bias in record.call.func.products:  # type: ignore[attr-defined]
        if id(weight) in trained:
            gradient, _ = ops.weighted_grad(a, b, w)
            add(weight, gradient)
        if bias is not None and id(bias) in trained:
            add(bias, bias_gradient(b, w))
    return found


OPENED = LayerRule(lambda call: True, _dots, _weighted_grads)
