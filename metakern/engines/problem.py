"""What an engine is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from metakern.capture.graph import leaves_of
from metakern.capture.losses import LossFunction, per_example_losses
from metakern.capture.members import modules_of
from metakern.capture.parameters import require_servable, select_parameters, trainable_parameters
from metakern.capture.state.function_state import filled_cells
from metakern.capture.state.writes import Writes
from metakern.engines.group import mean_over_group
from metakern.layers.precision import require_precision

_CRITERIA = frozenset(("torch.nn.modules.loss", "torch.nn.functional"))
"""Where torch has its losses."""


@dataclass(frozen=True)
class Problem:
    """One call of a public function: a model, its batches, and which parameters count. Passes over a part of a batch,
    or over other examples, are problems made from it by `dataclasses.replace`.
    """

    model: nn.Module
    batch: Any
    meta_batch: Any
    loss_fn: LossFunction | None
    trainable: dict[str, nn.Parameter]  # every parameter that gets a gradient
    chosen: dict[str, nn.Parameter]  # those that contribute to the dots
    writes: Writes  # what the passes over its batches write into parameters
    memory: str
    process_group: Any = None
    dot_precision: str = "same"  # what the ghost engine's products behind the dots may be rounded to
    unused: set[str] | None = None  # parameters that took no part in the pass; None if that is an error
    argument: str = "batch"  # what errors call the batch
    reached: set[int] | None = None  # parameters that took part, if the pass is one of several that may leave some out
    compared: bool = True  # whether a model's first results are compared with autograd's: not if they are rounded

    @property
    def chosen_by_identity(self) -> dict[int, nn.Parameter]:
        """The chosen parameters by identity, as in traces."""
        return {id(p): p for p in self.chosen.values()}

    def by_identity(self, v: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """A direction in chosen parameters, given by name, keyed by identity."""
        return {id(self.chosen[name]): along for name, along in v.items()}

    @cached_property
    def context(self) -> Hashable:
        """What may couple examples besides the traced calls: the loss, and the mode of every module."""
        return _written(self.loss_fn), tuple(module.training for module in modules_of(self.model))

    @cached_property
    def meta_share(self) -> float:
        """Size of the meta batch relative to the batch, by their first tensors: an estimate for the rows of layers."""
        return _elements(self.meta_batch) / max(_elements(self.batch), 1)

    def batch_losses(self) -> Tensor:
        self.writes.settle()
        with self.writes.watching():
            return per_example_losses(self.model, self.batch, self.loss_fn, self.argument)

    def meta_losses(self) -> Tensor:
        return per_example_losses(self.model, self.meta_batch, self.loss_fn, "meta_batch")

    def meta_gradient(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean meta loss and its gradient V = (1/m) sum_j g'_j in the chosen parameters, by one plain backward pass.

        In a process group, V is over the meta batches of all ranks, the loss over this rank's alone. The backward pass
        is inside as well, since checkpointed layers run again there.
        """
        with self.writes.meta_pass():
            losses = self.meta_losses()
            meta_loss = losses.mean()
            found = torch.autograd.grad(meta_loss, list(self.chosen.values()), allow_unused=True)
        v = named_gradients(self.chosen, found)
        return meta_loss.detach(), mean_over_group(v, self.chosen, len(losses), self.process_group)

    def require_own(self, leaves: Iterable[Tensor]) -> None:
        """Raise ValueError if the losses depend on a parameter that the model does not have: it would not learn."""
        own = {id(p) for p in self.trainable.values()}
        for leaf in leaves:
            if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
                raise ValueError(
                    f"the losses of {self.argument} depend on a trainable parameter of shape {tuple(leaf.shape)} that "
                    "is not among the model's, so it would get no gradient: make it, or the module that has it, part "
                    "of the model; or, if it is not to be trained, freeze it, or detach() what is computed with it"
                )

    def require_participation(self, reached: Collection[int]) -> None:
        """Raise ValueError for a trainable parameter that the losses do not depend on (`reached` holds the identities
        of the others), or record its name; of one pass among several, record which are reached.
        """
        if self.reached is not None:
            self.reached.update(reached)
            return
        missing = [name for name, p in self.trainable.items() if id(p) not in reached]
        if self.unused is not None:
            self.unused.clear()
            self.unused.update(missing)
        elif missing:
            owner = missing[0].rpartition(".")[0] or "the model itself"
            raise ValueError(
                f"parameter '{missing[0]}' (of module '{owner}') did not take part in the losses of batch"
                + (f", nor did {len(missing) - 1} more" if missing[1:] else "")
                + "; freeze it with requires_grad_(False), make the forward pass use it, or leave it without a "
                "gradient by allow_unused=True"
            )

    def require_reached(self, outputs: Tensor) -> None:
        """Both checks by the graph of `outputs`, for passes without a trace."""
        leaves = leaves_of(outputs)
        self.require_own(leaves.values())
        self.require_participation(leaves)

    def without_unused(self, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        """Only the gradients of parameters that took part, as autograd returns them."""
        return {name: g for name, g in gradient.items() if name not in self.unused} if self.unused else gradient


def _written(made: Any, depth: int = 4) -> Hashable:
    """What tells functions apart that are made anew for each step: their code, and the words, truth values and
    functions that they were made with.
    """
    made = getattr(made, "_torchdynamo_orig_callable", made)  # all compiled ones share a wrapper
    if isinstance(made, (str, bool)):
        return made
    if isinstance(made, partial):
        held = [made.func, *made.args, *made.keywords.values()]
    elif isinstance(made, FunctionType):
        held = [
            *(content for _, content in filled_cells(made)),
            *(made.__defaults__ or ()),
            *(made.__kwdefaults__ or {}).values(),
        ]
    else:
        held = []
    written = getattr(made, "__code__", None) or (type(made), getattr(made, "__qualname__", ""))
    return written, tuple(_written(one, depth - 1) for one in held) if depth else ()


def _elements(batch: Any) -> int:
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)), 1)


def named_gradients(names: Iterable[str], found: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """The gradients that exist, by name; dense, since neither forward mode nor bags accept a sparse direction, such as
    that of an embedding with sparse=True.
    """
    return {name: g.to_dense() if g.is_sparse else g for name, g in zip(names, found, strict=False) if g is not None}


class Answer(NamedTuple):
    """Dots, losses and meta loss, and a function for the weighted gradient that reuses their work."""

    dots: Tensor
    losses: Tensor
    meta_loss: Tensor
    weighted_gradient: Callable[[Tensor], dict[str, Tensor]]


def pose(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    loss_fn: LossFunction | None,
    params: Any,
    memory: str,
    process_group: Any = None,
    dot_precision: str = "same",
    allow_unused: bool = False,
) -> Problem:
    """Validate the arguments that all public functions share.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what was expected.
    """
    require_servable(model)
    if memory not in ("reuse", "two_pass"):
        raise ValueError(f"memory must be 'reuse' or 'two_pass', got {memory!r}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(model, batch) -> losses[n], got {type(loss_fn).__name__}")
    if getattr(getattr(loss_fn, "func", loss_fn), "__module__", None) in _CRITERIA:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise TypeError(
            f"loss_fn is called with model and batch, and {name} takes outputs and targets; pass "
            "lambda model, batch: criterion(model(batch[0]), batch[1]), with reduction='none' and one loss per example"
        )
    trainable = trainable_parameters(model)
    chosen = select_parameters(model, trainable, params)
    require_precision(dot_precision, next(iter(chosen.values())).device)
    if allow_unused and process_group is not None:
        raise ValueError("allow_unused=True and process_group cannot be combined: all ranks must use all parameters")
    if process_group is not None and not hasattr(process_group, "allreduce"):
        got = type(process_group).__name__
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {got}")
    writes, unused = Writes(model, parameters_only=True), set[str]() if allow_unused else None
    return Problem(
        model=model,
        batch=batch,
        meta_batch=meta_batch,
        loss_fn=loss_fn,
        trainable=trainable,
        chosen=chosen,
        writes=writes,
        memory=memory,
        process_group=process_group,
        dot_precision=dot_precision,
        unused=unused,
        compared=dot_precision == "same",
    )
