"""What autograd keeps of a call for its backward pass, read from the graph node: numbers, sizes and tensors.

A backward pass consists of these and the graph alone. If two passes have the same graph, numbers and sizes, only the
values of tensors can put rows in other places.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from metakern.capture.independence.numbers import numbers_of, plain
from metakern.capture.independence.reordering import is_index
from metakern.capture.outputs import tensors_in
from metakern.capture.record import Gap

# These scale or bound values, describe memory layout, or belong to a single row. They may differ in every step.
_VALUES = frozenset(
    "alpha beta delta dropout dropout_p eps epsilon ignore_index input_lengths input_scale lambd margin max max_val "
    "min min_val negative_slope scale target_lengths value weight mat1_sym_strides mat2_sym_strides "
    "self_sym_strides".split()
)
# Of these only whole numbers are special: an exponent of zero, the order of a norm.
_WHOLE = frozenset("exponent initial lower maxnorm ord other p scalar scalars self threshold upper".split())
_KEPT, _RAW = "_saved_", "_raw_saved_"

# These select by floating-point numbers, write into a part of a tensor, or leave out NaN, which `poison.py`
# reveals if it sees the call.
_UNTOLD = (
    "GridSampler", "FractionalMaxPool", "CopySlices", "Renorm", "NanToNum", "Nanmedian", "Mode", "Fmax", "Fmin",
    "PowBackward1",
)  # fmt: skip
_INERT = (type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator)

_READERS: dict[str, Callable[[Any], Any]] = {}


def numbers_at(node: Any, name: str) -> Any:
    """Numbers that the node of that name keeps, including sizes of its inputs."""
    read = _READERS.get(name)
    if read is None:
        read = _READERS[name] = _reader(type(node))
    return read(node)


def _reader(kind: type) -> Callable[[Any], Any]:
    kept, tensors = _attributes(kind, _KEPT), _attributes(kind, _RAW)
    left_out = {*_VALUES, "p"} if "Dropout" in kind.__name__ else _VALUES
    names = [name for name in kept if name not in tensors and name not in left_out]
    if not names:
        return lambda node: None
    get = attrgetter(*[_KEPT + name for name in names])
    return get if _WHOLE.isdisjoint(names) else lambda node: plain(get(node))


def _attributes(kind: type, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in dir(kind) if name.startswith(prefix)]


def unseen_nodes(nodes: Iterable[Any], gaps: Sequence[Gap]) -> list[Any]:
    """The nodes that were made outside any call, with sequence numbers inside `gaps`."""
    found = []
    for node in nodes:
        number = node._sequence_nr()
        place = bisect(gaps, number, key=lambda gap: gap[0]) - 1
        if place >= 0 and number < gaps[place][1]:
            found.append(node)
    return found


def unseen_numbers(node: Any) -> Hashable:
    """Output sizes of such a node, and what a custom autograd.Function keeps without torch's knowledge."""
    sizes = plain([made.shape for made in node._input_metadata])
    kept = tuple(vars(node).values()) if isinstance(node, BackwardCFunction) else ()
    return sizes, numbers_of(kept, {}, fractions=True)


def may_pick_rows(node: Any, constants: Sequence[Tensor]) -> bool:
    """Whether a node that no traced call made may select rows, or leave some out, by values of tensors.

    `constants` are tensors of the model, which are the same in every pass if they hold floating-point numbers.
    """
    if isinstance(node, BackwardCFunction):
        return _own_may_pick(node, constants)
    kind = type(node)
    known = torch._C._functions  # pyright: ignore[reportAttributeAccessIssue]
    if getattr(known, kind.__name__, None) is not kind or kind.__name__.startswith(_UNTOLD):
        return True
    kept = [getattr(node, _RAW + name) for name in _attributes(kind, _RAW)]
    held = [tensor.data for entry in kept for tensor in (entry if isinstance(entry, tuple) else (entry,))]
    return any(t is not None and (not isinstance(t, Tensor) or is_index(t)) for t in held)


def _own_may_pick(node: Any, constants: Sequence[Tensor]) -> bool:
    """The same for a custom autograd.Function. Assumed to select no rows: floating-point tensors that it computed,
    masks in the shape of an output, and what saved-tensor hooks have packed if all its inputs are activations.
    """
    if node._forward_cls.__module__.startswith("metakern."):
        return False
    before = [function for function, _ in node.next_functions]  # one for each tensor that it took
    shapes = [made.shape for made in node._input_metadata]
    saved = [kept.data for kept in node._raw_saved_tensors]
    packed = any(value is not None and not isinstance(value, Tensor) for value in saved)
    if packed and (None in before or len(before) < len(node.needs_input_grad)):
        return True
    for tensor in tensors_in([*saved, *vars(node).values()]):
        if tensor.requires_grad or isinstance(tensor, nn.Parameter):
            continue
        if is_index(tensor):
            if tensor.dtype is not torch.bool or list(tensor.shape) not in shapes:
                return True
        elif None in before and not any(tensor is constant for constant in constants):
            return True
    return any(map(_may_hold_anything, vars(node).values()))


def _may_hold_anything(value: Any) -> bool:
    return not isinstance(value, (Tensor, *_INERT)) and not callable(value) and plain(value, fractions=True) is None
