"""A forward pass in which chosen examples are NaN from the first layer on, to see whom they reach.

The backward proof of `capture.examples` can be stopped by a hinge that is shut in the batch at hand (relu's backward
selects, it does not multiply). Forward, NaN passes relu, clamp and max, so a coupling that sleeps shows all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metakern.capture.losses import LossFunction, evaluate_losses
from metakern.capture.members import constants_of
from metakern.capture.outputs import tensors_in
from metakern.capture.record import Call
from metakern.capture.state import PassState
from metakern.capture.trace import Tracer

# They leave out one side, entry by entry; the other side may be taken in the next batch.
_SELECTIONS = frozenset("where masked_fill masked_fill_ fmax fmin nan_to_num nan_to_num_".split())
_WITHOUT_NAN = {"nansum": torch.sum, "nanmean": torch.mean}
# What is ignored now may have a label in the next batch.
_LABELLED = frozenset(("cross_entropy", "cross_entropy_rows", "nll_loss"))


class _Poisoner(Tracer):
    """Fills the rows of the examples `inside` with NaN in the output of every use."""

    def __init__(self, parameters: Any, constants: Any, axes: Sequence[Sequence[Any]], inside: Tensor) -> None:
        super().__init__(parameters, constants)
        self._axes, self._inside = axes, inside

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in _SELECTIONS and isinstance(output, Tensor):
            for candidate in (*args, *(kwargs or {}).values()):
                if isinstance(candidate, Tensor) and candidate.is_floating_point():
                    _fill(output, candidate.detach().isnan())
        elif name in _WITHOUT_NAN:
            _fill(output, _WITHOUT_NAN[name](*args, **(kwargs or {})).detach().isnan())
        elif name in _LABELLED and args:
            missing = args[0].detach().isnan().any(1 if args[0].dim() > 1 else 0)
            _fill(output, missing if missing.shape == output.shape else missing.any())
        return output

    def _note(self, call: Call, output: Any, data: list[Tensor], upstream: tuple[Any, ...]) -> None:
        before = len(self.uses)
        super()._note(call, output, data, upstream)
        # What a call changes in place may be the user's own batch; the uses before and after it carry the NaN.
        if before < len(self.uses) <= len(self._axes) and not call.in_place:
            differentiable = [t for t in tensors_in(output) if t.requires_grad]
            for tensor, axis in zip(differentiable, self._axes[before]):
                if axis is not None:
                    _fill(tensor, axis.spread(self._inside, tensor.shape))


def _fill(tensor: Tensor, where: Tensor) -> None:
    """NaN into a tensor of this pass: not a write that is undone after it."""
    with torch._C.DisableTorchFunction():
        tensor.data.masked_fill_(where, torch.nan)


@contextmanager
def _distributions_take_nan() -> Iterator[None]:
    """Inside the block distributions do not check their arguments."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def poisoned_losses(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None,
    trainable: Mapping[str, nn.Parameter],
    axes: Sequence[Sequence[Any]],
    inside: Tensor,
) -> Tensor:
    """Losses [n] of a pass in which the examples `inside` are NaN; the model is as before."""
    with PassState(model, loss_fn).replayed(), _distributions_take_nan():
        constants = constants_of(model)
        with _Poisoner(trainable.values(), constants, axes, inside):
            return evaluate_losses(model, batch, loss_fn, "batch").detach().clone()
