"""Recurrent layers and cells on a GPU, step by step: cuDNN's layers and torch's fused cells have no forward mode.

All are written for packed sequences: `sizes` says how many rows, sorted by length, there are at each step; sequences of
one length are packed with the same size at every step. Formulas: `layers/recurrence.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

States = tuple[Tensor, ...]
"""h, and of an LSTM c: [rows, .]"""
Cell = Callable[[Tensor, Tensor, States], States]
"""x_t W^T + b, h_(t-1) U^T + c and the states before -> the states after."""


def _rnn(activation: Callable[[Tensor], Tensor], given: Tensor, recurring: Tensor, _: States) -> States:
    return (activation(given + recurring),)


def _lstm(given: Tensor, recurring: Tensor, before: States) -> States:
    i, f, g, o = (given + recurring).chunk(4, -1)
    c = f.sigmoid() * before[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(given: Tensor, recurring: Tensor, before: States) -> States:
    (r, z, n), (from_r, from_z, from_n) = given.chunk(3, -1), recurring.chunk(3, -1)
    z, n = (z + from_z).sigmoid(), (n + (r + from_r).sigmoid() * from_n).tanh()
    return (n + z * (before[0] - n),)


def _layer(
    cell: Cell, rows: Tensor, sizes: list[int], start: States, weights: list[Tensor], backwards: bool
) -> tuple[Tensor, States]:
    """Hidden states of all steps, packed like `rows`, and the last states of every sequence."""
    w, u, *others = weights
    b, c, *projection = others if len(others) > 1 else [None, None, *others]
    given = F.linear(rows, w, b).split(sizes)
    states, hidden, over = tuple(s[:0] for s in start) if backwards else start, [], []
    for one in reversed(given) if backwards else given:
        over.append(tuple(s[len(one) :] for s in states))  # forwards, short sequences end before others
        states = tuple(torch.cat([s[: len(one)], new[len(s) : len(one)]]) for s, new in zip(states, start))
        h, *memory = cell(one, F.linear(states[0], u, c), states)
        states = (F.linear(h, projection[0]) if projection else h, *memory)
        hidden.append(states[0])
    last = tuple(torch.cat(parts) for parts in zip(states, *reversed(over)))
    return torch.cat(hidden[::-1] if backwards else hidden), last


def _layers(
    cell: Cell, rows: Tensor, sizes: list[int], start: States, weights: list[Tensor], *settings: Any
) -> tuple[Tensor, States]:
    _, layers, dropout, training, bidirectional = settings
    directions, last = 1 + bool(bidirectional), []
    per_direction = len(weights) // (layers * directions)
    for layer in range(layers):
        rows = F.dropout(rows, dropout, training) if layer else rows
        found = []
        for place in range(layer * directions, (layer + 1) * directions):
            theirs = weights[place * per_direction : (place + 1) * per_direction]
            begin = tuple(s[place] for s in start)
            found.append(_layer(cell, rows, sizes, begin, theirs, backwards=place > layer * directions))
        rows = torch.cat([hidden for hidden, _ in found], -1)
        last += [states for _, states in found]
    return rows, tuple(torch.stack(each) for each in zip(*last))


def _of_layers(cell: Cell) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        if isinstance(args[3], (list, tuple)):  # packed: data, sizes, states, weights, ...
            rows, sizes, start, *others = args
            hidden, last = _layers(cell, rows, sizes.tolist(), _states(start), *others)
            return hidden, *last
        x, start, *others, batch_first = args
        x = x.transpose(0, 1) if batch_first else x
        hidden, last = _layers(cell, x.flatten(0, 1), [x.shape[1]] * x.shape[0], _states(start), *others)
        hidden = hidden.unflatten(0, x.shape[:2])
        return hidden.transpose(0, 1) if batch_first else hidden, *last

    return called


def _of_cell(cell: Cell) -> Callable[..., Any]:
    def called(x: Tensor, start: Any, w: Tensor, u: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Any:
        before = _states(start)
        after = cell(F.linear(x, w, b), F.linear(before[0], u, c), before)
        return after[0] if isinstance(start, Tensor) else after

    return called


def _states(given: Tensor | Sequence[Tensor]) -> States:
    return (given,) if isinstance(given, Tensor) else tuple(given)


def _on_a_gpu(function: Callable[..., Any], form: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: (form if args[0].is_cuda else function)(*args, **kwargs)


STEP_BY_STEP: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: _of_layers(_lstm),
    torch.gru: _of_layers(_gru),
    torch.rnn_tanh: _of_layers(partial(_rnn, torch.tanh)),
    torch.rnn_relu: _of_layers(partial(_rnn, torch.relu)),
    torch.lstm_cell: _of_cell(_lstm),
    torch.gru_cell: _of_cell(_gru),
}
RECURRENT_FORMS = {function: _on_a_gpu(function, form) for function, form in STEP_BY_STEP.items()}
