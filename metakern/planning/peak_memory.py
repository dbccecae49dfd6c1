"""Peak memory of a plain step and of the ghost engine's, foretold from the sizes of what their passes keep.

Whole batches or by parts; forward mode's is in `forward_mode_memory.py`.

A backward pass is followed from use to use: what autograd still keeps, the output gradients and gradients of parameters
that are there already, and what is on its way. Buffers inside kernels and what an allocator wastes are not in it.
"""

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

Sizes = dict[int, int]
"""Bytes by storage, or by identity of a parameter: what is held twice counts once."""


class Memory(NamedTuple):
    """Bytes at the peak, beyond those before the step. The largest of four phases is that of memory="reuse"."""

    plain: int  # a plain step
    train: int  # the train pass back to its first use: what autograd keeps, every A, every B met so far
    meta: int  # every A and B, and a pass of the meta batch
    dots: int  # every A and B, V, and the meta records of the pairs form
    gradient: int  # every A and B not taken yet, and the gradients that are there
    two_pass: int  # the largest phase of memory="two_pass"

    @property
    def reuse(self) -> int:
        return max(self.train, self.meta, self.dots, self.gradient)


class KeptPass(NamedTuple):
    """What one forward pass keeps for its backward pass, use by use in the order of the calls."""

    saved: Sequence[Sequence[Sizes]]  # by autograd before use k, in the order in which it is saved; last, after all
    inputs: Sequence[Sizes]  # A
    outputs: Sequence[int]  # B
    downwards: Sequence[int]  # the gradient of A, where one is asked for
    parameters: Sequence[Sizes]  # of the use, and with that of their gradients


def kept_pass(problem: Problem, batch: Any, argument: str) -> KeptPass:
    """Trace a batch as `trace_batch` does, and note what the graph of its losses keeps.

    Raises: RuntimeError where the model differentiates by torch.func, which forbids to look.
    """
    tracer, noted = Tracer(problem.trainable.values(), constants_of(problem.model)), list[tuple[int, Tensor]]()

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
        saved,
        [sizes(inputs_of(use.call), before) for use in uses],
        [_output_bytes(use) for use in uses],
        [sum(bytes_of(t) for t in inputs_of(use.call) if t.requires_grad) for use in uses],
        [{id(p): bytes_of(p) for _, p in use.call.parameters} for use in uses],
    )


def foretold(train: KeptPass, meta: KeptPass, without_v: Collection[int], paired: Collection[int]) -> Memory:
    """The peaks of a step.

    Args:
        without_v: identities of the parameters that V is not formed for: pairs serve them, or no dots run over them.
        paired: uses of the meta pass whose A and B stay for the pairs form.
    """
    uses = range(len(train.outputs))
    inputs = total(train.inputs)
    graph, records = sum(graph_of(train, inputs).values()), sum(inputs.values()) + sum(train.outputs)
    meta_pass = backward_peak(meta, total(meta.inputs), paired, without_v)
    v = gradients(meta, 0, without_v) + sum(total(meta.inputs[j] for j in paired).values())
    v += sum(meta.outputs[j] for j in paired)
    plain = backward_peak(train, {}, (), ())
    left = (sum(total(train.inputs[: k + 1]).values()) + sum(train.outputs[: k + 1]) for k in uses)
    return Memory(
        plain=plain,
        train=_record_peak(train),
        meta=records + meta_pass,
        dots=records + v,
        gradient=max((some + gradients(train, k, ()) for k, some in enumerate(left)), default=0),
        two_pass=max(graph + meta_pass, graph + v + _passing(train), plain),
    )


def foretold_by_parts(
    train: KeptPass, meta: KeptPass, without_v: Collection[int], parts: float, meta_parts: float
) -> Memory:
    """The peaks of a step with `micro_batch`: V first, then the dots of each part beside it, then its gradient.

    Args:
        train, meta: of one part of either batch.
        parts, meta_parts: how many parts there are, or 1.
    """
    v, parameters = gradients(meta, 0, without_v), total(train.parameters)
    meta_pass, gradient = backward_peak(meta, {}, (), without_v), backward_peak(train, {}, (), ())
    meta_two_pass = meta_pass
    if meta_parts > 1:  # beside the sum of the parts before and the last of them; and one for the proof of independence
        meta_two_pass = 2 * v + max(meta_pass, sum(graph_of(meta).values()))
        meta_pass = 2 * v + max(meta_pass, _record_peak(meta))
    if parts > 1:
        summed = sum(parameters.values())
        gradient = summed + max(gradient, summed + max(parameters.values(), default=0))
    in_passing = v + sum(graph_of(train).values()) + _passing(train)
    return Memory(
        plain=backward_peak(_times(parts, train), {}, (), ()),
        train=v + _record_peak(train),
        meta=meta_pass,
        dots=v + sum(total(train.inputs).values()) + sum(train.outputs),
        gradient=gradient,
        two_pass=max(meta_two_pass, in_passing, gradient),
    )


def _record_peak(kept: KeptPass) -> int:
    """Of a backward pass to every B."""
    return backward_peak(kept, total(kept.inputs), range(len(kept.outputs)), None)


def _times(parts: float, kept: KeptPass) -> KeptPass:
    """A pass of so many times as many examples."""

    def grown(found: Sizes) -> Sizes:
        return {key: round(parts * size) for key, size in found.items()}

    return KeptPass(
        [list(map(grown, some)) for some in kept.saved],
        list(map(grown, kept.inputs)),
        [round(parts * size) for size in kept.outputs],
        [round(parts * size) for size in kept.downwards],
        kept.parameters,
    )


def _passing(kept: KeptPass) -> int:
    """The largest B on its way, with the gradient of A that is made of it."""
    return max((size + max(below, size) for size, below in zip(kept.outputs, kept.downwards)), default=0)


def backward_peak(kept: KeptPass, held: Sizes, outputs: Collection[int], without: Collection[int] | None) -> int:
    """The largest sum of a backward pass, with what is `held` all the while.

    B of the uses `outputs` stays; gradients are formed of all parameters but those `without`, or of none.
    """
    peak = sum(graph_of(kept, held).values())
    for k in reversed(range(len(kept.outputs))):
        staying = sum(kept.outputs[j] for j in outputs if j > k)
        staying += 0 if without is None else gradients(kept, k, without)
        earlier = total(_flat(kept.saved[:k]), held)
        at = sum(total(kept.saved[k], earlier).values()) + kept.outputs[k] + kept.downwards[k]
        # On the way to the use before, the last operation has its output's gradient and makes its input's, while what
        # it saved, first of all since that use, is still there.
        between = sum(total(kept.saved[k][:1], earlier).values()) + (2 * kept.outputs[k - 1] if k else 0)
        peak = max(peak, staying + at, staying + between + (kept.outputs[k] if k in outputs else 0))
    return peak


def graph_of(kept: KeptPass, held: Sizes | None = None) -> Sizes:
    """All that autograd keeps of a pass, with what is `held` beside it."""
    return total(_flat(kept.saved), held)


def gradients(kept: KeptPass, k: int, without: Collection[int]) -> int:
    """Gradients of parameters that are there once the backward pass has come down to use k."""
    return sum(size for key, size in total(kept.parameters[k:]).items() if key not in without)


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


def _flat(saved: Iterable[Iterable[Sizes]]) -> Iterable[Sizes]:
    return (part for parts in saved for part in parts)


def _output_bytes(use: Use) -> int:
    dtype = use.call.autocast[1] if use.call.autocast else use.call.parameters[0][1].dtype
    return sum(shape.numel() for shape in use.output_shapes) * dtype.itemsize


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
