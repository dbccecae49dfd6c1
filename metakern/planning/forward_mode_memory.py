"""Peak memory of a step by forward mode, foretold from sizes.

The dual pass holds a value and a tangent where the model holds a tensor, and further tensors while a call is made. Of
the products that the first pass has kept it needs no value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from metakern.capture.layout import is_sparse
from metakern.capture.losses import evaluate_losses
from metakern.engines.jvp import PLAIN_ATTENTION
from metakern.engines.problem import Problem
from metakern.engines.substitution import substituted
from metakern.planning.kept_pass import Sizes, bytes_of, kept_pass, sizes, there_before
from metakern.planning.peak_memory import Memory, backward_peak, gradients, graph_of

_PRODUCTS = frozenset("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())

_KNOWN = _PRODUCTS | {"batch_norm"}
"""Of what the dual pass takes the value, or the statistics, from the first pass (`engines/products.py`)."""

_TERMS = {**dict.fromkeys(_PRODUCTS, 2), "linear": 3} | dict.fromkeys(
    ("mul", "__mul__", "__rmul__", "div", "__truediv__", "matmul", "__matmul__", "bmm"), 2
)
"""Where a tangent is the sum of a term for each operand that has one: the terms that are there beside the sum."""

_FURTHER = {
    **dict.fromkeys(("batch_norm", "instance_norm", "layer_norm", "group_norm"), 4),
    **{"silu": 5, "max_pool1d": 2, "max_pool2d": 2, "softmax": 1, "log_softmax": 1},
}
"""Tensors as large as the output that torch's forward mode of other calls holds beside their value and tangent, as
counted with torch 2.13; none of what is not named."""

_LOSSES = {"cross_entropy": 3, "cross_entropy_rows": 3}
"""The same, as large as the input: logarithms of probabilities, their tangents, and what these are made of."""


def by_forward_mode(problem: Problem) -> Memory:
    """The peaks of a step by forward mode; its phase "dots" is the dual pass.

    Raises:
        EngineUnavailable: the uses of parameters, which backward passes are followed by, cannot be traced.
        RuntimeError: the model differentiates by torch.func, which forbids to look.
    """
    meta = kept_pass(problem, problem.meta_batch, "meta_batch")
    plain = backward_peak(kept_pass(problem, problem.batch, "batch"), {}, (), ())
    products = _Products()
    with PLAIN_ATTENTION():
        with products:
            train = kept_pass(problem, problem.batch, "batch")
        known, anew = _dual_peak(problem, products.usable()), _dual_peak(problem, [])
    graph = graph_of(train)
    kept = sum((graph | sizes(products.tensors(), there_before(problem.model, problem.batch))).values())
    alone = sum(graph.values())
    without_v = {id(p) for p in problem.trainable.values()} - problem.chosen_by_identity.keys()
    meta_pass, v = backward_peak(meta, {}, (), without_v), gradients(meta, 0, without_v)
    gradient = backward_peak(train, {}, (), ())
    two_pass = max(alone + meta_pass, alone + v + anew, gradient)
    return Memory(plain, kept, kept + meta_pass, kept + v + known, gradient, two_pass)


class _Products(TorchFunctionMode):
    """Notes what the dual pass need not compute again."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[str, Tensor, int, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _KNOWN:
            self._found.append((name, output.detach(), output._version, args[0].detach()))
        return output

    def usable(self) -> list[bool]:
        """Call by call, whether nothing was written into a product since."""
        return [name not in _PRODUCTS or output._version == version for name, output, version, _ in self._found]

    def tensors(self) -> Iterator[Tensor]:
        """Outputs of products, and the inputs of all."""
        for name, output, _, given in self._found:
            yield given
            if name in _PRODUCTS:
                yield output


def _dual_peak(problem: Problem, usable: list[bool]) -> int:
    """What the dual pass makes, at its largest: a pass without graph, in which each tensor counts as it would there."""
    detached = {id(p): p.detach() for p in problem.trainable.values()}
    dual = {id(detached[id(p)]) for p in problem.chosen.values()}
    alive = _Alive(there_before(problem.model, problem.batch), dual, usable)
    with alive, substituted(problem.model, detached):
        evaluate_losses(problem.model, problem.batch, problem.loss_fn, "batch")
    return alive.peak


class _Held(NamedTuple):
    """A storage that the dual pass makes."""

    storage: StorageWeakRef
    bytes: int  # of its value, if that is not known, and its tangent, if there is one
    has_tangent: bool


class _Alive(TorchFunctionMode):
    """Adds up, call by call, what a dual pass would hold where this pass holds a tensor."""

    def __init__(self, before: Sizes, dual: set[int], usable: list[bool]) -> None:
        super().__init__()
        self.peak = 0
        self._before, self._dual, self._usable = before, dual, iter(usable)
        self._held: dict[int, _Held] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        duals = [self._has_tangent(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        output = func(*args, **(kwargs or {}))
        name: str = getattr(func, "__name__", "")
        known = name in _KNOWN and next(self._usable, False)
        made = self._note(output, value=not (known and name in _PRODUCTS), tangent=any(duals))
        further = 0
        if duals[:1] == [True] and isinstance(args[0], Tensor):
            further = _further(name, known, sum(duals)) * made + _LOSSES.get(name, 0) * bytes_of(args[0])
            further += 2 * bytes_of(output) if output is args[0] else 0  # in place: the old value, the new tangent
        self._held = {key: held for key, held in self._held.items() if not held.storage.expired()}
        self.peak = max(self.peak, sum(held.bytes for held in self._held.values()) + further)
        return output

    def _has_tangent(self, tensor: Tensor) -> bool:
        if is_sparse(tensor):
            return False
        held = self._held.get(_storage_of(tensor).cdata)
        return id(tensor) in self._dual or (held is not None and held.has_tangent)

    def _note(self, output: Any, value: bool, tangent: bool) -> int:
        """Add what the call has made; its bytes, counted once."""
        made = 0
        for tensor in tree_leaves(output):
            for size in sizes([tensor], self._before).values():
                storage = _storage_of(tensor)
                if storage.cdata not in self._held:
                    dual = tangent and tensor.is_floating_point()
                    self._held[storage.cdata] = _Held(storage, size * (value + dual), dual)
                    made += size
        return made


def _further(name: str, known: bool, duals: int) -> int:
    """How many tensors as large as its output a call holds beside its value and tangent."""
    if name in _TERMS:
        return 2 * (duals > 1) if known else min(duals, _TERMS[name])
    return 1 if known else _FURTHER.get(name, 0)


def _storage_of(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
