"""Which part of a layer's output belongs to which example: proved, not assumed.

Layers have the batch first, second (time-major attention), or folded into another dimension (tokens as rows, windows).
Per-layer dots are right only if the loss of one example reaches the output of a layer only at that example's own rows.
The proof uses NaN: the backward pass runs with NaN as the cotangent of a set S of examples, and NaN may arrive only at
rows that belong to S. NaN times zero is NaN, so the strength of an interaction does not matter, and no tolerance is
needed. For any two examples one S holds the first and not the second, so all pairs are covered; some log2 n + 3 sets
are enough. This finds the axis, and it finds examples that interact (batch statistics, contrastive losses, graphs);
then this engine rejects the model. The same check is then made in the forward pass (`poison.py`), which also finds
couplings that are inactive in this batch.

The verdict is kept per model and structure, so later steps cost nothing extra. If a pass has other sizes or numbers
than any before, the alignment of rows is checked again for these (`order.py`), which costs two or three more
backward passes, and the forward passes of the proof are run for them. If a pass may select rows by data (sorting,
routing), rows are checked in every step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metakern.capture.graph import Fingerprint, output_gradients
from metakern.capture.host import host_may_wait, is_traced
from metakern.capture.independence.axes import ExampleAxis as ExampleAxis
from metakern.capture.independence.axes import Kind, candidates, kind_of, sized
from metakern.capture.independence.order import require_linear, require_order
from metakern.capture.record import Pick, Trace
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.buffers import unchanged_buffers

Poisoned = Callable[[Sequence[Sequence[ExampleAxis | None]], Tensor], Tensor]


Axes = list[list[ExampleAxis | None]]
"""For every output of every use; None if no loss depends on it."""


class _Proved(NamedTuple):
    """The axes of one form of a pass; `moves`: rows may be selected by data; `lasting`: no inactive couplings."""

    axes: Axes
    moves: bool
    lasting: bool


@dataclass
class _Verdicts:
    """For one model: kinds of axes by structure; axes by structure, sizes and numbers; or why it is rejected."""

    kinds: dict[Hashable, list[list[Kind | None]] | str] = field(default_factory=dict)
    axes: dict[Hashable, _Proved | str] = field(default_factory=dict)
    new_in_a_row: int = 0  # passes of a structure not met before, since the last one of a known structure


_KNOWN: WeakKeyDictionary[torch.nn.Module, _Verdicts] = WeakKeyDictionary()
_MOST = 4096
"""How many combinations of sizes and numbers are remembered per model."""
_AT_ONCE = 32
"""So many new forms are proved as soon as they occur; beyond that, a form is proved when it occurs a second time."""


def example_axes(
    model: torch.nn.Module, trace: Trace, fingerprint: Fingerprint, context: Hashable, poisoned: Poisoned
) -> Axes:
    """The example axes; raises EngineUnavailable if examples interact.

    `context` names what else decides how examples may interact: the loss function and the training flags.
    `poisoned(axes, inside)` repeats the pass with the examples `inside` set to NaN and returns its losses.
    """
    if trace.examples == 1:
        return [[ExampleAxis(0, 1, shape[0] if shape else 1) for shape in use.output_shapes] for use in trace.uses]
    known = _KNOWN.get(model)
    if known is None:
        known = _KNOWN[model] = _Verdicts()
    form = (fingerprint, context, trace.numbers, trace.examples, _sizes(trace))
    found = known.axes.get(form)
    if isinstance(found, str):
        raise EngineUnavailable(found)
    if found is not None:
        known.new_in_a_row = 0
    if (found is None or found.moves or not found.lasting) and not host_may_wait():
        raise EngineUnavailable(
            "which rows belong to which example has to be looked up in every pass of this model, which a CUDA graph "
            "cannot do; run the step without capturing it"
        )
    if found is not None and not found.moves and found.lasting:
        return found.axes
    # The NaN of the proof is intended; what checkpointed layers write in its backward passes is undone.
    with torch.autograd.set_detect_anomaly(False), unchanged_buffers(model):
        if found is None:
            moves = trace.reorders or fingerprint.unseen
            return _found_out(trace, known, form, (fingerprint.operations, context), moves, poisoned)
        if found.moves or is_traced():
            require_order(trace, found.axes)
        else:
            known.axes[form] = _lasting(trace, found, known.axes, form, poisoned)
    return found.axes


def new_in_a_row(model: torch.nn.Module) -> int:
    """How many of the last passes of a model in a row had a new structure."""
    known = _KNOWN.get(model)
    return 0 if known is None else known.new_in_a_row


def _sizes(trace: Trace) -> Hashable:
    return tuple([(use.call.name, use.output_shapes) for use in trace.uses])


def _found_out(
    trace: Trace, known: _Verdicts, form: Hashable, structure: Hashable, moves: bool, poisoned: Poisoned
) -> Axes:
    """The axes of a new form: those of a known structure, at other sizes or numbers, or proved."""
    structure = (structure, tuple((use.name, tuple(len(s) for s in use.output_shapes)) for use in trace.uses))
    kinds = known.kinds.get(structure)
    known.new_in_a_row = known.new_in_a_row + 1 if kinds is None else 0
    if isinstance(kinds, str):
        raise EngineUnavailable(kinds)
    axes = None if kinds is None else _sized_all(kinds, trace)
    proved = axes is None
    if axes is None:
        axes = _prove(trace, known.kinds, structure, poisoned)
    moves = moves or any(_may_move_examples(trace, pick) for pick in trace.picks)
    try:
        if moves or not proved:
            require_order(trace, axes)
    except EngineUnavailable as refusal:
        if not moves:
            _remember(known, form, str(refusal))
        raise
    found = _Proved(axes, moves, lasting=proved or moves)
    if not found.lasting and len(known.axes) < _AT_ONCE and not is_traced():
        found = _lasting(trace, found, known.axes, form, poisoned)
    if structure in known.kinds:
        _remember(known, form, found)
    return axes


def _remember(known: _Verdicts, form: Hashable, found: _Proved | str) -> None:
    if len(known.axes) >= _MOST:
        known.axes.clear()
    known.axes[form] = found


def _lasting(
    trace: Trace, found: _Proved, verdicts: dict[Hashable, Any], form: Hashable, poisoned: Poisoned
) -> _Proved:
    """`found`, marked as lasting once forward passes with NaN have ruled out couplings inactive in this batch."""
    _require_no_forward_path(trace, found.axes, verdicts, form, poisoned)
    return found._replace(lasting=True)


def _may_move_examples(trace: Trace, pick: Pick) -> bool:
    """Whether the examples may lie along the dimensions by which a call selects, found by NaN as in the proof."""
    n = trace.examples
    dims = [dim for dim in pick.dims if pick.shape[dim] and pick.shape[dim] % n == 0]
    if not dims or pick.edge is None:
        return bool(dims)
    left = list(candidates(pick.shape, n))
    for inside in _sets(n, trace.losses.device):
        cotangent = torch.ones_like(trace.losses).masked_fill_(inside, torch.nan)
        (grad,) = torch.autograd.grad(trace.losses, [pick.edge], cotangent, retain_graph=True, allow_unused=True)
        if grad is not None:
            left = [axis for axis in left if _stays_inside(grad.isnan(), axis, inside)]
    return not left or any(axis.dim in dims for axis in left)


def _sized_all(verdict: list[list[Kind | None]], trace: Trace) -> Axes | None:
    """The known axes at the sizes of this pass; None if a size does not fit."""
    axes: Axes = []
    for kinds, use in zip(verdict, trace.uses):
        line = [kind and sized(kind, shape, trace.examples) for kind, shape in zip(kinds, use.output_shapes)]
        if any(axis is None and kind is not None for axis, kind in zip(line, kinds)):
            return None
        axes.append(line)
    return axes


def _prove(trace: Trace, known: dict[Hashable, Any], structure: Hashable, poisoned: Poisoned) -> Axes:
    """The axes that survive every set S; raises if none does. The verdict is kept if exactly one survives wherever a
    gradient arrives, and the batch is ordinary: B is finite, and not zero everywhere.
    """
    n = trace.examples
    fitting = [[list(candidates(shape, n)) for shape in use.output_shapes] for use in trace.uses]
    plain = output_gradients(trace, retain_graph=True)
    finite = all(bool(torch.isfinite(b).all()) for line in plain for b in line if b is not None)
    if finite:
        require_linear(trace, plain)
    for inside in _sets(n, trace.losses.device):
        cotangent = torch.ones_like(trace.losses).masked_fill_(inside, torch.nan)
        for line, before, after in zip(fitting, plain, output_gradients(trace, cotangent, retain_graph=True)):
            for k, (b, grad) in enumerate(zip(before, after)):
                if grad is not None and grad.numel():
                    # Entries that are not finite anyway tell nothing; dots that use them will not be finite either.
                    reached = grad.isnan() if finite or b is None else grad.isnan() & b.isfinite()
                    line[k] = [axis for axis in line[k] if _stays_inside(reached, axis, inside)]
    _require_axes(trace, plain, fitting, known, structure)
    axes: Axes = [[found[0] if len(found) == 1 else None for found in line] for line in fitting]
    _require_no_forward_path(trace, axes, known, structure, poisoned)
    shown = any(bool(b.any()) for line in plain for b in line if b is not None)  # nothing is shown if all B are zero
    reached = [[b is not None for b in line] for line in plain]
    if finite and shown and all(map(_told, axes, reached)):
        known[structure] = [
            [kind_of(axis) if axis is not None and yes else None for axis, yes in zip(*each)]
            for each in zip(axes, reached)
        ]
    return [
        [(found[0] if found else ExampleAxis(0, 1, 1)) if yes else None for found, yes in zip(*each)]
        for each in zip(fitting, reached)
    ]


def _told(axes: Sequence[ExampleAxis | None], reached: Sequence[bool]) -> bool:
    return all(axis is not None or not yes for axis, yes in zip(axes, reached))


def _sets(examples: int, device: torch.device) -> Iterator[Tensor]:
    """Sets of examples, as masks, such that every ordered pair has a set that holds the first and not the second: each
    example is in half of the sets, and no two are in the same ones.
    """
    count = next(count for count in itertools.count(2) if math.comb(count, count // 2) >= examples)
    codes = list(itertools.islice(itertools.combinations(range(count), count // 2), examples))
    masks = torch.zeros(examples, count, dtype=torch.bool, device=device)
    masks.scatter_(1, torch.tensor(codes, device=device), True)
    yield from masks.t().contiguous()


def _stays_inside(reached: Tensor, axis: ExampleAxis, inside: Tensor) -> bool:
    return not bool((reached & ~axis.spread(inside, reached.shape)).any())


def _require_axes(trace: Trace, plain: list, fitting: list, known: dict[Hashable, Any], structure: Hashable) -> None:
    for use, grads, line in zip(trace.uses, plain, fitting):
        for shape, grad, found in zip(use.output_shapes, grads, line):
            if grad is not None and grad.numel() and not found:
                known[structure] = reason = (
                    f"examples interact: the gradient of one example's loss reaches the output of {use.name} (shape "
                    f"{tuple(shape)}) at rows of other examples; per-layer dots would be wrong, engine='jvp' is exact"
                )
                raise EngineUnavailable(reason)


def _require_no_forward_path(
    trace: Trace,
    axes: Sequence[Sequence[ExampleAxis | None]],
    verdicts: dict[Hashable, Any],
    key: Hashable,
    poisoned: Poisoned,
) -> None:
    """Raise if NaN in some examples reaches the loss of others; the verdict is kept under `key`."""
    for inside in _sets(trace.examples, trace.losses.device):
        try:
            reached = poisoned(axes, inside).isnan()
        except (MemoryError, torch.OutOfMemoryError):
            raise  # says nothing about the model: a smaller batch may fit
        except Exception as error:
            reason = f"a pass with NaN in some examples failed ({error}), so their independence cannot be proved"
        else:
            if not bool((reached & ~inside).any()):
                continue
            reason = (
                "examples interact: what one example computes reaches the loss of another, though perhaps not its "
                "gradient in this batch; engine='jvp' is exact"
            )
        verdicts[key] = reason
        raise EngineUnavailable(reason)
