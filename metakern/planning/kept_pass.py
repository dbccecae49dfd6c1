"""What one forward pass keeps for its backward pass, use by use, in bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from metakern.capture.losses import per_example_losses
from metakern.capture.members import constants_of
from metakern.capture.record import Call, Use
from metakern.capture.trace import Tracer, tensor_arguments
from metakern.capture.whole_modules import registered_modules_as_wholes
from metakern.engines.problem import Problem

_WITHIN = frozenset("linear matmul __matmul__ mm addmm".split())
"""Products with a weight: what other uses have given is added to within the product (`layers/linear.py`)."""

_IN_PLACE = frozenset(("embedding",))
"""Rows that are added in place to what other uses have given (`layers/embedding.py`)."""

Sizes = dict[int, int]
"""Bytes by storage, or by identity of a parameter: what is held twice counts once."""


class KeptPass(NamedTuple):
    """What one forward pass keeps for its backward pass, use by use in the order of the calls."""

    saved: Sequence[Sequence[Sizes]]  # by autograd before use k, in the order in which it is saved; last, after all
    inputs: Sequence[Sizes]  # A
    outputs: Sequence[int]  # B
    by_example: Sequence[bool]  # whether gradients of single examples, far smaller, are kept in place of A and B
    downwards: Sequence[int]  # the gradient of A, where one is asked for
    parameters: Sequence[Sizes]  # of the use, and with that of their gradients
    views: Sequence[bool]  # whether autograd gets the gradient of its weight as a view, into which it adds nothing
    sums: Sequence[int]  # tensors that our weighted gradient takes to add to what later uses gave, which is one of them
    loss: int  # gradients on the way from the loss to the output of the last use

    @property
    def recorded(self) -> list[int]:
        """Uses whose A and B are kept."""
        return [k for k, folds in enumerate(self.by_example) if not folds]

    def records(self, before: int | None = None) -> int:
        """Every A and B that is kept, or those of the uses before one."""
        uses = [k for k in self.recorded if before is None or k < before]
        return sum(total(self.inputs[k] for k in uses).values()) + sum(self.outputs[k] for k in uses)


def kept_pass(problem: Problem, batch: Any, argument: str, folded: Collection[int] = ()) -> KeptPass:
    """Trace a batch as `trace_batch` does, and note what the graph of its losses keeps.

    Args:
        folded: uses of which gradients of single examples are kept in place of A and B.
    Raises: RuntimeError where the model differentiates by torch.func, which forbids to look.
    """
    tracer, noted = Tracer(problem.trainable.values(), constants_of(problem.model)), list[tuple[int, Tensor]]()
    owners = {_place(p): id(p) for p in problem.trainable.values()}

    def note(tensor: Tensor) -> Tensor:
        noted.append((len(tracer.uses), tensor))
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor), registered_modules_as_wholes(problem.model, tracer), tracer:
        losses = per_example_losses(problem.model, batch, problem.loss_fn, argument)
    uses, before = tracer.trace(losses).uses, there_before(problem.model, batch)
    saved: list[list[Sizes]] = [[] for _ in range(len(uses) + 1)]
    for k, tensor in noted:
        saved[k].append(sizes([tensor], before))
    return KeptPass(
        saved=saved,
        inputs=[sizes(inputs_of(use.call), before) for use in uses],
        outputs=[_output_bytes(use) for use in uses],
        by_example=[k in folded for k in range(len(uses))],
        downwards=[sum(bytes_of(t) for t in inputs_of(use.call) if t.requires_grad) for use in uses],
        parameters=[{owners.get(_place(p), id(p)): bytes_of(p) for _, p in use.call.parameters} for use in uses],
        views=[_transposed(use.call, owners) for use in uses],
        sums=[1 if use.call.name in _IN_PLACE else 2 if use.call.name in _WITHIN else 3 for use in uses],
        loss=_loss_gradients(uses, [tensor for k, tensor in noted if k == len(uses)]),
    )


def inputs_of(call: Call) -> list[Tensor]:
    """A: the tensors that a use reads beside its parameters; a sum keeps none."""
    parameters = {id(p) for _, p in call.parameters}
    given = tensor_arguments(call.args, call.kwargs) if call.versions else ()
    return [tensor for _, tensor in given if id(tensor) not in parameters]


def there_before(model: nn.Module, batch: Any) -> Sizes:
    """Storages of the model and of its batch."""
    return sizes([*model.parameters(), *model.buffers(), *tree_leaves(batch)], ())


def sizes(tensors: Iterable[Any], before: Collection[int]) -> Sizes:
    """Bytes by storage, without those that were there before."""
    strided = [t for t in tensors if isinstance(t, Tensor) and t.layout == torch.strided]
    storages = [tensor.untyped_storage() for tensor in strided]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes() and s.data_ptr() not in before}


def total(parts: Iterable[Sizes], start: Sizes | None = None) -> Sizes:
    """All of them, each storage once."""
    found = dict(start or {})
    for part in parts:
        found.update(part)
    return found


def _place(tensor: Tensor) -> tuple[int, ...]:
    """The same for a parameter and for a view of the whole of it, such as a transpose: their gradients are summed."""
    return *sizes([tensor], ()), tensor.storage_offset(), tensor.numel()


def _transposed(call: Call, owners: dict[tuple[int, ...], int]) -> bool:
    """Whether the gradient of a parameter comes back as a view: a linear layer's, or one of which a view was read."""
    return call.name == "linear" or any(owners.get(_place(p), id(p)) != id(p) for _, p in call.parameters)


def _loss_gradients(uses: Sequence[Use], saved: Sequence[Tensor]) -> int:
    """Two as large as the last output where the loss begins by an operation that keeps its result, as `log_softmax`
    does; one where it keeps what it reads, of which it writes the gradient.
    """
    if not uses or not saved:
        return 0
    first = saved[0] if saved[0]._base is None else saved[0]._base
    node = first.grad_fn
    reads = node is not None and node._sequence_nr() <= uses[-1].edges[0].node._sequence_nr()
    return _output_bytes(uses[-1]) * (1 if reads else 2)


def _output_bytes(use: Use) -> int:
    dtype = use.call.autocast[1] if use.call.autocast else use.call.parameters[0][1].dtype
    return sum(shape.numel() for shape in use.output_shapes) * dtype.itemsize


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
