"""Undo what a forward pass writes into existing tensors: a running centre, a memory bank, clipped weights.

A pass that does not count must leave nothing there, and a step that fails or starts again needs its weights back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _unsafe_set_version_counter
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

from metakern.capture.function import Function, function_of, may_write, written_by
from metakern.capture.members import parameters_of
from metakern.capture.outputs import tensors_in
from metakern.capture.state.function_state import FunctionState
from metakern.capture.state.graph_state import Changes, GraphState
from metakern.capture.state.snapshot import address
from metakern.capture.unrolled import SeeingMode


class _Kept(NamedTuple):
    """A copy of memory before it is written into, and the tensors that use this memory."""

    memory: Tensor
    value: Tensor
    owners: list[tuple[Tensor, Tensor, int | None]]  # tensor, its `.data`, its version

    def put_back(self) -> None:
        self.memory.copy_(self.value)
        for tensor, data, version in self.owners:
            if tensor.data_ptr() != data.data_ptr():  # `tensor.data = other`
                tensor.data = data
            if version is not None:  # a graph may have saved these values at that version
                _unsafe_set_version_counter((tensor,), (version,))


def _kept(memory: Tensor, owners: Iterable[Tensor]) -> _Kept:
    held = [(t, t.data, None if t.is_inference() else t._version) for t in owners]
    return _Kept(memory, memory.clone(), held)


def _memory(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor, as a view made by torch's operators so that a traced program holds it too."""
    whole = (tensor if tensor._base is None else tensor._base).data
    size = whole.untyped_storage().nbytes() // whole.element_size()
    if whole.numel() == size and whole.is_contiguous():
        return whole
    return whole.as_strided((size,), (1,), 0)  # inductor rejects as_strided


class Writes:
    """Copies of tensors from outside a pass, made before the first call that may write into them: of parameters only,
    or of everything that is not an activation.
    """

    def __init__(self, model: nn.Module, parameters_only: bool = False) -> None:
        self._model, self._parameters_only = model, parameters_only
        self._parameters: dict[int, list[nn.Parameter]] | None = None
        self._kept: dict[int, _Kept] = {}
        self.seen_pass = False  # whether a whole pass was watched
        self.functions: FunctionState | None = None
        self.meta_changes: Changes | None = None  # by the meta batch
        self._made: set[int | torch.SymInt] = set()  # places of tensors that the pass itself made
        self._generators: dict[int, tuple[torch.Generator, Tensor]] = {}

    def __bool__(self) -> bool:
        """Has anything been written?"""
        return bool(self._kept or self._generators)

    def found(self, tensor: Tensor) -> bool:
        """Has a call been seen that may have written into the tensor's memory?"""
        return _place(tensor) in self._kept

    def before(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy what the call that is about to run may write into."""
        for target in tensors_in(written_by(function, args, kwargs)):
            self._keep(target)
        generator = kwargs.get("generator")
        if generator is not None and not self._parameters_only:
            self._generators.setdefault(id(generator), (generator, generator.get_state()))

    def _keep(self, target: Tensor) -> None:
        if is_functorch_wrapped_tensor(target) or target.grad_fn is not None or unpack_dual(target).tangent is not None:
            return  # an activation of this pass
        place = _place(target)
        if place == 0 or place in self._kept or place in self._made:
            return
        owners = self._parameters_at(place)
        if owners or not self._parameters_only:
            self._kept[place] = _kept(_memory(target), owners or [target])

    def _parameters_at(self, place: int) -> list[nn.Parameter]:
        if self._parameters is None:
            self._parameters = {}
            for p in parameters_of(self._model):
                self._parameters.setdefault(_place(p), []).append(p)
        return self._parameters.get(place, [])

    def after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note memory that a call has allocated: outputs that share none with its arguments belong to this pass."""
        if self._parameters_only:
            return
        found = {_place_read(t) for t in tensors_in(output) if t.grad_fn is None} - self._made
        if found:
            self._made |= found.difference(map(_place_read, tensors_in([*args, *kwargs.values()])))

    def keep_functions(self, *functions: Any) -> None:
        """Keep the state of these functions if that was not done yet: they may fail after passes that do not count."""
        if self.functions is None:
            self.functions = FunctionState(self._model, *functions)

    def undo(self) -> None:
        for kept in self._kept.values():
            kept.put_back()
        for generator, state in self._generators.values():
            generator.set_state(state)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block every call is watched."""
        with _Watch(self):
            yield
        self.seen_pass = True

    def graph_state(self) -> GraphState:
        """What the model holds now, and the tensors that were found around it."""
        return GraphState(self._model, [] if self.functions is None else self.functions.tensors)

    @contextmanager
    def meta_pass(self) -> Iterator[None]:
        """For the meta batch's pass, between the forward and the backward pass of the training batch. What it writes
        into parameters and buffers is undone; its other changes are put aside until `settle`.
        """
        before = self.graph_state()
        self.settle()
        try:
            with self._taken_back():
                yield
        finally:
            self.meta_changes = before.take_back()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """For passes that do not count: inside the block, `settle` does not bring back what the meta batch changed."""
        left, self.meta_changes = self.meta_changes, None
        try:
            yield
        finally:
            self.meta_changes = left

    def settle(self) -> None:
        """Bring back what the meta batch's pass changed, on top of what the training batch's did."""
        if self.meta_changes is not None:
            self.meta_changes.reapply()
            self.meta_changes = None

    @contextmanager
    def _taken_back(self) -> Iterator[None]:
        """For a pass that does not count: what it writes is undone after the block.

        If an earlier pass was watched and wrote nothing, this one is not watched.
        """
        if self.seen_pass and not self:
            yield
            return
        own = Writes(self._model, self._parameters_only)
        try:
            with own.watching():
                yield
        finally:
            own.undo()

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Inside the block, memory that was written into is as it was before."""
        now = [_kept(kept.memory, [tensor for tensor, _, _ in kept.owners]) for kept in self._kept.values()]
        for kept in self._kept.values():
            kept.put_back()
        try:
            yield
        finally:
            for kept in now:
                kept.put_back()


class _Watch(SeeingMode):
    """Shows every call of a pass to `writes`."""

    def __init__(self, writes: Writes) -> None:
        super().__init__()
        self._writes = writes

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        function = function_of(func)
        kwargs = kwargs or {}
        if may_write(function, args, kwargs) or "generator" in kwargs:
            self._writes.before(function, args, kwargs)
        output = func(*args, **kwargs)
        if function.kind not in ("metadata", "attribute"):
            self._writes.after(args, kwargs, output)
        return output


def _place(tensor: Tensor) -> int:
    """The address of the storage of a tensor that may be written; 0 if it has none (inside vmap, sparse tensors)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _place_read(tensor: Tensor) -> int | torch.SymInt:
    """The same for a tensor that is only read; copy-on-write memory stays shared."""
    try:
        return address(tensor) - tensor.storage_offset() * tensor.element_size()
    except (NotImplementedError, RuntimeError):
        return 0


@contextmanager
def nothing_written(model: nn.Module) -> Iterator[None]:
    """Tensors that exist before the block are as before after it, in value and in storage."""
    writes = Writes(model)
    try:
        with _Watch(writes):
            yield
    finally:
        writes.undo()
