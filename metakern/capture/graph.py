"""The autograd graph of a traced pass: whether every use is known, and the output gradients B."""

from __future__ import annotations

import marshal
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from metakern.capture.independence.nodes import may_pick_rows, numbers_at, unseen_nodes, unseen_numbers
from metakern.capture.record import Trace, Use, place_of
from metakern.capture.refusal import EngineUnavailable


class Fingerprint(NamedTuple):
    """The form of a pass. `operations`: hash of the nodes, and of which outputs of uses they read. `order`: hash of how
    they are connected, and of their numbers. `unseen`: untraced nodes may select rows by values of tensors.
    """

    operations: int
    order: int
    unseen: bool


def require_complete(trace: Trace, names: Mapping[int, str]) -> tuple[Fingerprint, list[Tensor]]:
    """Raise unless every path from the losses to a trainable parameter goes through a traced use.

    `names` maps the identity of each trainable parameter to its qualified name. The walk starts at the losses and at
    the data inputs of every use, and stops at the outputs of uses, so it can only reach a parameter by a path that
    the trace does not know. Returns a fingerprint of the operations on the way, which differs if the model takes
    another branch, or puts rows into another order, and whatever else would get a gradient without being in a use.
    """
    places: dict[Any, int] = {None: -1}  # node -> when it was met
    for edge in (edge for use in trace.uses for edge in use.edges):
        places.setdefault(edge.node, len(places))
    ends, ahead = len(places), []
    first = math.inf if trace.reorders else trace.first  # with `reorders`, rows are checked in every step anyway

    def place(node: Any) -> int:
        found = places.get(node)
        if found is None:
            found = places[node] = len(places)
            ahead.append(node)
        return found

    read, leaves = set[tuple[int, int]](), list[Tensor]()
    met, order = [], [place(trace.losses.grad_fn), *(tuple([place(n) for n in use.upstream]) for use in trace.uses)]
    while ahead:
        node = ahead.pop()
        name = node.name()
        met.append("ViewBackward0" if name == "ReshapeAliasBackward0" else name)  # same call, with or without a mode
        if name.endswith("AccumulateGrad"):
            leaves.append(node.variable)
        inputs = [(place(before), output) for before, output in node.next_functions]
        read.update([pair for pair in inputs if pair[0] < ends])
        if node._sequence_nr() >= first:  # how earlier nodes ordered the rows of the inputs does not matter
            order.append((inputs, numbers_at(node, name)))
    _require_traced(leaves, names)
    unseen = unseen_nodes(list(places)[ends:], trace.gaps) if trace.gaps and not trace.reorders else []
    may_pick = any([may_pick_rows(node, trace.constants) for node in unseen])
    numbers = [order, [unseen_numbers(node) for node in unseen]]
    return Fingerprint(hash((tuple(met), frozenset(read))), _hash(numbers), may_pick), leaves


def _require_traced(leaves: Iterable[Tensor], names: Mapping[int, str]) -> None:
    for leaf in leaves:
        if id(leaf) in names:
            raise EngineUnavailable(
                f"parameter '{names[id(leaf)]}' is used in a way that tracing a forward pass does not see (a custom "
                "autograd.Function, a scripted module, reentrant checkpointing, a write through a view); use "
                "engine='jvp', or register the module that owns it with metakern.register_layer"
            )


def _hash(numbers: Any) -> int:
    try:
        return hash(marshal.dumps(numbers, 2))  # nested lists of numbers, in a tenth of the time that `hash` takes
    except ValueError:  # sizes of nested tensors are not numbers
        return hash(repr(numbers))


def output_gradients(
    trace: Trace, weights: Tensor | None = None, retain_graph: bool = False
) -> list[list[Tensor | None]]:
    """B of every use: d(sum_n weights_n loss_n)/d(output), by one backward pass that forms no parameter gradient."""
    cotangent = torch.ones_like(trace.losses) if weights is None else weights
    return list(_grads_of(trace, trace.uses, cotangent, retain_graph))


def _grads_of(
    trace: Trace, uses: Sequence[Use], cotangent: Tensor, retain_graph: bool
) -> Iterator[list[Tensor | None]]:
    edges = [edge for use in uses for edge in use.edges]
    if not edges:
        return
    with _after_hooks(trace, edges) as after:
        found = torch.autograd.grad(trace.losses, edges, cotangent, retain_graph=retain_graph, allow_unused=True)
    grads = (after.get(k, grad) for k, grad in enumerate(found))
    for use in uses:
        yield [_shaped(next(grads), shape) for shape in use.output_shapes]


@contextmanager
def _after_hooks(trace: Trace, edges: Sequence[GradientEdge]) -> Iterator[dict[int, Tensor | None]]:
    """For edges whose tensors have hooks, the gradients after these hooks, by index. If the backward pass continues
    through the node, torch returns the gradients from before them.
    """
    after: dict[int, Tensor | None] = {}

    def watcher(k: int, output: int) -> Callable[[Sequence[Tensor | None]], None]:
        return lambda grads: after.update({k: grads[output]})

    handles = [
        edge.node.register_prehook(watcher(k, edge.output_nr))
        for k, edge in enumerate(edges)
        if trace.hooked and place_of(edge) in trace.hooked
    ]
    try:
        yield after
    finally:
        for handle in handles:
            handle.remove()


def _shaped(grad: Tensor | None, shape: torch.Size) -> Tensor | None:
    """B in the shape of the output, which may be a view of the tensor whose edge was taken."""
    return None if grad is None else grad.view(shape) if grad.shape != shape else grad


def visit_output_gradients(
    trace: Trace,
    visit: Callable[[int, list[Tensor | None]], None],
    passing: Collection[int],
    retain_graph: bool = False,
) -> None:
    """Call `visit(use index, B)` for every use in one backward pass: for those in `passing` as soon as B is known, so
    that it is not kept; for the others after the pass.

    B can be seen in passing only at a node that runs. So uses that depend on no other use are visited after the pass.
    """
    late = {*range(len(trace.uses))}.difference(passing) | _lowest(trace.uses, passing)
    handles, asked = [], sorted(late)
    try:
        for k in passing:
            if k not in late:
                handles.extend(_watch(k, trace.uses[k], visit))
        uses = [trace.uses[k] for k in asked]
        found = list(_grads_of(trace, uses, torch.ones_like(trace.losses), retain_graph))
    finally:
        for handle in handles:
            handle.remove()
    for k, grads in zip(asked, found, strict=True):
        visit(k, grads)


def _lowest(uses: Sequence[Use], among: Iterable[int]) -> set[int]:
    """The uses in `among` with an output that depends on no other use: no gradient is wanted beyond it, so its node
    does not run. (The user's inputs may have a graph, and one of two outputs may be a view of a parameter.)
    """
    known, free = {edge.node for use in uses for edge in use.edges}, set[Any]()
    return {k for k in among if not all([_reaches(known, edge.node, free) for edge in uses[k].edges])}


def _reaches(known: set[Any], start: Any, free: set[Any]) -> bool:
    """Whether a path leads back from a node to a `known` one; nodes without such a path are added to `free`."""
    met, ahead = set[Any](), [before for before, _ in start.next_functions]
    while ahead and ahead[-1] not in known:
        node = ahead.pop()
        if node is not None and node not in free and node not in met:
            met.add(node)
            ahead += [before for before, _ in node.next_functions]
    if not ahead:
        free |= met
    return bool(ahead)


def leaves_of(outputs: Tensor) -> dict[int, Tensor]:
    """The tensors to which a backward pass from `outputs` would give a gradient, by identity."""
    return {id(node.variable): node.variable for node in nodes_of(outputs) if hasattr(node, "variable")}


def _watch(k: int, use: Use, visit: Callable[[int, list[Tensor | None]], None]) -> list:
    """Hooks that pass the output gradients of one use to `visit` when its nodes run."""

    def watcher(position: int, output_nr: int) -> Callable[[Sequence[Tensor | None]], None]:
        def watch(grads: Sequence[Tensor | None]) -> None:
            found: list[Tensor | None] = [None] * len(use.edges)
            found[position] = _shaped(grads[output_nr], use.output_shapes[position])
            visit(k, found)

        return watch

    return [edge.node.register_prehook(watcher(p, edge.output_nr)) for p, edge in enumerate(use.edges)]


@contextmanager
def differentiable_functions(losses: Tensor) -> Iterator[None]:
    """Inside the block, a backward pass with `create_graph=True` raises if the backward of a custom function breaks the
    graph: the gradient that it is given requires grad, but what it returns does not.

    Raises: EngineUnavailable naming the function.
    """
    handles = [node.register_hook(partial(_require_graph, node.name())) for node in _custom_functions(losses)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_graph(name: str, given: Sequence[Tensor | None], taken: Sequence[Tensor | None]) -> None:
    """`given` are the gradients of the inputs, `taken` those of the outputs."""
    if any(g is not None and g.requires_grad for g in taken) and any(
        g is not None and not g.requires_grad and bool(g.any()) for g in given
    ):
        raise EngineUnavailable(
            f"the backward of a custom autograd.Function, {name.removesuffix('Backward')}, cannot be differentiated "
            "again, and autograd does not report it: write it with torch functions, not under torch.no_grad"
        )


def _custom_functions(losses: Tensor) -> list[Any]:
    return [node for node in nodes_of(losses) if isinstance(node, BackwardCFunction)]


def nodes_of(losses: Tensor) -> Iterator[Any]:
    """Every node of the graph of the losses, once."""
    seen, ahead = set(), [losses.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
            yield node


def computes_in(losses: Tensor, *kinds: torch.dtype) -> bool:
    """Whether anything in the graph is in one of these precisions, for example by autocast inside the model."""
    return any(entry.dtype in kinds for node in nodes_of(losses) for entry in node._input_metadata)
