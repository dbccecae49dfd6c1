"""A forward pass with chosen examples set to NaN from the first layer on, to see whose losses they reach.

The backward proof of `examples.py` misses couplings behind a hinge that is inactive in this batch (relu's backward
selects rather than multiplies). In a forward pass, NaN goes through relu, clamp and max, so these couplings show too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metakern.capture.losses import LossFunction, evaluate_losses
from metakern.capture.members import constants_of
from metakern.capture.outputs import tensors_in
from metakern.capture.record import Call
from metakern.capture.state.passes import PassState
from metakern.capture.state.process_wide import ProcessWide
from metakern.capture.trace import Tracer
from metakern.capture.whole_modules import registered_modules_as_wholes

# Entry by entry, they may ignore one of their inputs in this batch (`where`, `x ** 0`) and use it in the next.
_SELECTIONS = frozenset(
    "where masked_fill masked_fill_ fmax fmin nan_to_num nan_to_num_ pow pow_ __pow__ __rpow__ __ipow__ float_power "
    "float_power_".split()
)
# A label that is ignored now may be used in the next batch.
_LABELLED = frozenset(
    "cross_entropy cross_entropy_rows nll_loss cosine_embedding_loss multilabel_margin_loss ctc_loss".split()
)


def _mode(input: Tensor, dim: int = -1, keepdim: bool = False) -> Tensor:
    return input.sum(dim, keepdim)


def _renorm(input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    return input + input.sum([d for d in range(input.dim()) if d != dim % input.dim()], keepdim=True)


_WITHOUT_NAN: dict[str, Callable[..., Any]] = {
    "nansum": torch.sum, "nanmean": torch.mean, "nanmedian": torch.median, "nanquantile": torch.quantile,
    "mode": _mode, "renorm": _renorm, "renorm_": _renorm,
}  # fmt: skip
"""Functions that may keep NaN from spreading, each with a replacement that spreads it."""

_KEPT_BACK = _SELECTIONS | _LABELLED | _WITHOUT_NAN.keys()


def _left_out(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Masks of where NaN should come out of a call that may hold it back. Run it first: the call may be in place."""
    given = [t.detach() for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    if name in _WITHOUT_NAN and given:
        return [tensors_in(_WITHOUT_NAN[name](*args, **kwargs))[0].detach().isnan()]
    masks = [t.isnan() for t in given]
    if name in _SELECTIONS:
        return masks
    over = (0, -1) if name == "ctc_loss" else (1,)  # classes lie along the second dimension, or the last of [t, n, C]
    return [mask.any(over) if mask.dim() > 1 else mask.any() for mask in masks]


class _Poisoner(Tracer):
    """Fills the rows of the examples `inside` with NaN in the output of every use."""

    def __init__(self, parameters: Any, constants: Any, axes: Sequence[Sequence[Any]], inside: Tensor) -> None:
        super().__init__(parameters, constants)
        self._axes, self._inside = axes, inside

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        masks = _left_out(name, args, kwargs or {}) if name in _KEPT_BACK else ()
        output = super().__torch_function__(func, types, args, kwargs)
        for tensor in tensors_in(output)[:1]:
            for mask in masks:
                _fill(tensor, mask if name not in _LABELLED or mask.shape == tensor.shape else mask.any())
        return output

    def _note(self, call: Call, output: Any, data: list[Tensor], upstream: tuple[Any, ...]) -> None:
        before = len(self.uses)
        super()._note(call, output, data, upstream)
        # What a call changes in place may be the user's own batch; the uses before and after it carry the NaN.
        if before < len(self.uses) <= len(self._axes) and not call.in_place:
            for (_, tensor), axis in zip(self._made(call, output), self._axes[before]):
                if axis is not None:
                    _fill_apart(tensor, axis.spread(self._inside, tensor.shape))


def _fill(tensor: Tensor, where: Tensor) -> None:
    """Write NaN into a tensor of this pass, hidden from the modes that would undo the write."""
    with torch._C.DisableTorchFunction():
        tensor.data.masked_fill_(where, torch.nan)


def _fill_apart(tensor: Tensor, where: Tensor) -> None:
    """The same in new memory: what a call returns may be a view of a parameter, which must not be overwritten."""
    with torch._C.DisableTorchFunction():
        tensor.data = tensor.data.masked_fill(where, torch.nan)


def _let_distributions_take_nan() -> Callable[[], object]:
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    return lambda: Distribution.set_default_validate_args(before)


_VALIDATION = ProcessWide(_let_distributions_take_nan)


def poisoned_losses(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None,
    trainable: Mapping[str, nn.Parameter],
    axes: Sequence[Sequence[Any]],
    inside: Tensor,
) -> Tensor:
    """Losses [n] of a pass in which the examples `inside` are NaN; the model is as before."""
    with PassState(model, loss_fn, deep=True).replayed(), _VALIDATION.changed():
        poisoner = _Poisoner(trainable.values(), constants_of(model), axes, inside)
        with registered_modules_as_wholes(model, poisoner), poisoner:  # the same uses as in the pass that was traced
            return evaluate_losses(model, batch, loss_fn, "batch").detach().clone()
