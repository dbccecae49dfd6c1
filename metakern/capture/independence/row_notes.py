"""Notes on what decides where rows go in a pass: numbers and tensors passed to calls, and nodes that no call made."""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.graph import get_gradient_edge

from metakern.capture.function import Function, is_in_place
from metakern.capture.independence.numbers import numbers_of, plain
from metakern.capture.independence.reordering import picked_dims, picks_rows, picks_unseen
from metakern.capture.outputs import tensors_in
from metakern.capture.record import Gap, Pick

next_node = torch._C._autograd._get_sequence_nr  # type: ignore[attr-defined]
"""The number that the next node of the graph will have."""


class RowNotes:
    """Filled call by call. `constants` are those of the model, `parametric` the identities of tensors made from
    parameters alone. Unless `wanted`, rows are assumed to go anywhere.
    """

    def __init__(self, constants: Sequence[Tensor], parametric: Container[int], wanted: bool) -> None:
        self.constants, self._parametric = constants, parametric
        self._static: dict[int, Tensor] = {}  # constants that are the same in every pass
        self.reorders = not wanted
        self.picks, self.numbers = list[Pick](), list[Hashable]()
        self.first = self.next = next_node()
        self.gaps = list[Gap]()

    def found(self) -> dict[str, Any]:
        """The fields of a `Trace` that these notes fill."""
        self.before_call()
        return {
            "reorders": self.reorders,
            "picks": tuple(self.picks),
            "numbers": hash(tuple(self.numbers)),
            "first": self.first,
            "gaps": tuple(self.gaps),
            "constants": self.constants,
        }

    def before_call(self) -> None:
        """Nodes made since the last call come from code that cannot be seen: scripted functions, custom
        autograd.Functions, extensions.
        """
        now = next_node()
        if now != self.next:
            self.gaps.append((self.next, now))
            self.next = now

    def note(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
        in_graph: bool = False,
    ) -> None:
        """A call on these tensors, with or without parameters. `in_graph`: it left a node in the graph, and its saved
        numbers are read from there; calls inside a use did not.
        """
        if self.reorders or not (any([t.requires_grad for t in tensors]) or peek_interpreter_stack()):
            return  # no activation; inside vmap none requires a gradient
        if function.numbered and not (in_graph and function.told_by_graph):
            self.numbers.append(numbers_of(args, kwargs, function.opaque))
            if len(tensors) == 2:  # `view_as` takes the sizes of the other one
                self.numbers.append(plain([tuple(t.shape) for t in tensors]))
        if function.in_place:
            self._note_target(*args[:1])
        if function.may_reorder:
            self._note_picks(function, args, kwargs)
        elif function.may_pick or function.opaque:
            given = tensors_in((*args, *kwargs.values()) if kwargs else args)
            taken = [t for t in given if id(t) not in self._parametric]
            if function.opaque:
                self.reorders = picks_unseen(taken, self.constants, self._is_static)
            else:
                self.reorders = picks_rows(taken, self._is_static)

    def _note_target(self, target: Any = None) -> None:
        """The target of a write, if it is a part of another tensor: record which part."""
        if isinstance(target, Tensor) and target._is_view():
            self.numbers.append((target.storage_offset(), target.shape, target.stride()))

    def _note_picks(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = args[0] if args and isinstance(args[0], Tensor) else None
        rows = None if source is None or id(source) in self._parametric else source  # a parameter holds no examples
        edge = get_gradient_edge(rows) if rows is not None and rows.requires_grad else None
        from_data = edge is not None or (rows is not None and peek_interpreter_stack() is not None)
        dims = picked_dims(function.name, args, kwargs, from_data, self._is_static)
        self.reorders = dims is None
        if source is not None and dims:
            self.picks.append(Pick(edge, source.shape, tuple(dims)))

    def note_module(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        """A registered module on these tensors: if not all of its calls were seen, it may select by any of them."""
        self.before_call()
        self.numbers.append(numbers_of(args, kwargs, fractions=True))
        last = max([t.grad_fn._sequence_nr() for t in tensors if t.grad_fn is not None], default=None)
        if last is not None and any(start > last for start, _ in self.gaps):
            self.reorders = self.reorders or picks_unseen(tensors, self.constants, self._is_static)

    def note_constant(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """`arange(n)` and its views hold the same numbers in every pass; a tensor made from a list may not."""
        whole = function.name == "arange" and len(args) == 1 and not {"start", "step"} & kwargs.keys()
        if whole or (self._static and function.static and args and self._is_static(args[0])):
            self._static[id(output)] = output
            self.numbers.append(numbers_of(args, kwargs))
        elif self._static and is_in_place(function, args, kwargs):
            self._static.clear()  # which of them share memory with what was written need not be known

    def note_write(self) -> None:
        """Data was written into some constant."""
        self._static.clear()

    def _is_static(self, tensor: Any) -> bool:
        return id(tensor) in self._static
