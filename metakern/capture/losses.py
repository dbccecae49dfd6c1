"""Batches in, one loss per example out: the only place where reductions are decided.

A batch is `(inputs, targets)`, a mapping with "labels" for `model(**batch)`, or anything that a
`loss_fn(model, batch)` accepts which returns one loss per example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.capture.host import finite_sum, host_may_wait, may_look_at_values
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.row_losses import row_losses
from metakern.capture.state.contents import PutBack, attributes_kept, content_of

LossFunction = Callable[[nn.Module, Any], Tensor]

_SHIFTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Models whose own loss has been compared: whether it takes each token's logits for a prediction of the next token."""

_HALVES = torch.float16, torch.bfloat16

_ANOTHER_LOSS = "regression, several labels at once or any other loss, pass loss_fn(model, batch) -> losses[n]"


def per_example_losses(model: nn.Module, batch: Any, loss_fn: LossFunction | None, argument: str) -> Tensor:
    """Losses l_n of one batch, shape [n]; `argument` is what errors call it ("batch", "meta_batch").

    Without `loss_fn` the loss is the cross entropy of each example; an example with several positions (tokens,
    pixels) counts the mean over its positions that are not ignored (-100).

    Raises:
        TypeError: the batch has no known form, or the losses are not a floating point tensor.
        ValueError: not one loss per example, no example at all, or a loss that is not finite.
    """
    losses = evaluate_losses(model, batch, loss_fn, argument)
    require_losses(losses, argument)
    return losses


def evaluate_losses(model: nn.Module, batch: Any, loss_fn: LossFunction | None, argument: str) -> Tensor:
    """As `per_example_losses`, without checking the result.

    Lists and dicts of the batch are restored: if one pass pops the labels, the next one finds them again.
    """
    contents = list(_contents(batch))
    try:
        return losses_of(model, batch, loss_fn, argument)
    except Exception as error:
        _note_batch(error, argument)
        raise
    finally:
        for put_back in contents:
            put_back()


def _note_batch(error: Exception, argument: str) -> None:
    """Add to an exception of the model's or the loss's which batch it came from."""
    add_note = getattr(error, "add_note", None)  # since Python 3.11
    if add_note and not isinstance(error, EngineUnavailable) and not str(error).startswith(argument):
        add_note(f"(raised while metakern computed the losses of {argument})")


def _contents(batch: Any, depth: int = 3) -> Iterator[PutBack]:
    """Functions that restore the collections and objects of a batch, but not the tensors in them."""
    if depth == 0 or isinstance(batch, (Tensor, str, int, float, nn.Module, type(None))):
        return
    put_back = content_of(batch)
    if put_back is not None:
        yield put_back
    elif hasattr(batch, "__dict__") and not callable(batch):  # an object of a library, such as a graph
        yield attributes_kept(batch)
    inside = [*batch] if isinstance(batch, (list, tuple)) else []
    if isinstance(batch, dict):
        inside = [*batch.values()]
    elif not inside and hasattr(batch, "__dict__"):
        inside = [*vars(batch).values()]
    for value in inside:
        yield from _contents(value, depth - 1)


def losses_of(model: nn.Module, batch: Any, loss_fn: LossFunction | None, argument: str) -> Tensor:
    """As `evaluate_losses`, without restoring anything."""
    if loss_fn is not None:
        return loss_fn(model, batch)
    if isinstance(batch, Mapping):
        return _mapping_losses(model, batch, argument)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
        return cross_entropy(logits_in(output_for(model, inputs)), targets, argument)
    raise TypeError(
        f"{argument} must be (inputs, targets) or a mapping with 'labels', or come with a loss_fn(model, batch); "
        f"got {type(batch).__name__}"
    )


def cross_entropy(logits: Tensor, targets: Tensor, argument: str = "batch") -> Tensor:
    """Cross entropy per example, [n, C, ...] logits and [n, ...] class indices or [n, C, ...] probabilities -> [n]."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"{argument}: targets must be a tensor of class indices, got {type(targets).__name__}")
    shape = logits.shape
    if len(shape) < 2:
        raise ValueError(
            f"{argument}: the model returned logits of shape {tuple(shape)}; the default loss needs [n, C] or "
            "[n, C, positions]; pass loss_fn(model, batch) -> losses[n] for another loss"
        )
    hard = not targets.is_floating_point()
    if hard and targets.dtype not in (torch.int64, torch.uint8):
        raise TypeError(
            f"{argument}: targets must be class indices in int64, got {targets.dtype}; call .long() on them"
        )
    found, expected = tuple(targets.shape), (shape[0], *shape[2:]) if hard else tuple(shape)
    if found != expected:
        raise ValueError(
            f"{argument}: targets have shape {found}; logits of shape {tuple(shape)} need "
            f"{'class indices' if hard else 'probabilities'} of shape {expected}; for {_ANOTHER_LOSS}"
        )
    if shape[1] == 1:
        raise ValueError(f"{argument}: one logit per example has no cross entropy over classes; for {_ANOTHER_LOSS}")
    if not hard:
        _require_distributions(targets, argument)
    try:
        losses = _entropies(logits, targets)
    except IndexError as error:
        raise ValueError(
            f"{argument}: targets hold a class that is not among the {shape[1]} of the logits ({error}); -100 "
            "leaves a position out"
        ) from error
    if losses.dim() == 1:
        return losses
    counted = (targets != -100).flatten(1).sum(1).clamp(min=1) if hard else losses[0].numel()
    return losses.flatten(1).sum(1) / counted


def _require_distributions(targets: Tensor, argument: str) -> None:
    """Regression targets and multi-label targets have the shape of probabilities as well."""
    if may_look_at_values() and bool(((targets < 0).any(1) | ((targets.sum(1) - 1).abs() > 0.01)).any()):
        raise ValueError(
            f"{argument}: targets of the shape of the logits must be probabilities, which are not negative and sum to "
            f"1 over the classes; for {_ANOTHER_LOSS}"
        )


def _entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy at every position, [n, ...]. If classes are adjacent in memory, as in token logits transposed from
    [n, t, C], row by row: that takes at most half the time.
    """
    if targets.is_floating_point() or logits.stride(1) != 1:
        return F.cross_entropy(logits, targets, reduction="none")
    if logits.dim() == 2:
        return row_losses(logits, targets)
    rows = logits.movedim(1, -1).flatten(0, -2)
    return row_losses(rows, targets.flatten()).view(targets.shape)


def output_for(model: nn.Module, inputs: Any) -> Any:
    """The output of the model for a mapping of keywords, a sequence of arguments, or one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def logits_in(output: Any) -> Tensor:
    """The logits in what a model returned: the tensor itself, or its entry called logits."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"the model returned {type(output).__name__}, neither a tensor nor an object with .logits; pass "
        "loss_fn(model, batch) -> losses[n]"
    )


def _mapping_losses(model: nn.Module, batch: Mapping[str, Any], argument: str) -> Tensor:
    """Losses of a model that takes labels as a keyword, as in transformers: cross entropy of its logits, whose mean
    must equal the model's own loss if it returns one.
    """
    if "labels" not in batch:
        raise ValueError(f"{argument} is a mapping without 'labels' (it has {sorted(batch)}); add them or pass loss_fn")
    output = model(**batch)
    logits, labels, own, shifts = logits_in(output), batch["labels"], _own_loss(output), False
    if logits.dim() == 3 and labels.dim() == 2:
        logits, shifts = logits.transpose(1, 2), _shifts(model, own, logits, labels)
    if shifts:
        labels = _following(labels)  # labels are shifted, since a slice of logits would be copied
    losses = cross_entropy(logits, labels, argument)
    if own is not None:
        with torch._C.DisableTorchFunction():
            wide = losses
            if model not in _SHIFTS and losses.dtype in _HALVES:  # once without rounding, which would hide a small term
                wide = cross_entropy(logits.detach().float(), labels, argument)
            _require_same_loss(own, wide, labels, argument)
        _SHIFTS[model] = shifts
    return losses


def _own_loss(output: Any) -> Tensor | None:
    """The loss that a model has computed from the labels, if it can be looked at here."""
    own = getattr(output, "loss", None)
    if not isinstance(own, Tensor) or own.dim() > 0 or not host_may_wait():
        return None
    return own if bool(own.isfinite()) else None


def _following(labels: Tensor) -> Tensor:
    """Labels [n, t] of the next token; there is none after the last."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def _shifts(model: nn.Module, own: Tensor | None, logits: Tensor, labels: Tensor) -> bool:
    """Whether the model predicts the next token. By its name, causal models do; but names can mislead (decoders with
    shifted labels, vision-language models), and so can values (both readings cost log C at first). The gradient of its
    own loss cannot: in logits [n, t, C], only that of the label is negative.
    """
    if model in _SHIFTS:
        return _SHIFTS[model]
    kind = type(model).__name__
    named = "CausalLM" in f"{getattr(model, 'loss_type', '')} {kind}" or kind.endswith("LMHeadModel")
    if own is None or not (own.requires_grad and logits.requires_grad):
        return named
    with torch._C.DisableTorchFunction():
        (slope,) = torch.autograd.grad(own, logits, retain_graph=True, allow_unused=True)
        if slope is None:  # the loss is of other logits
            return named
        fits = {shifts: _fitting(slope, _following(labels) if shifts else labels) for shifts in (named, not named)}
    return max(fits, key=lambda shifts: fits[shifts])  # the first of two that fit alike


def _fitting(slope: Tensor, labels: Tensor) -> int:
    """Positions at which the gradient in logits [n, t, C] is that for these labels."""
    counted = (slope != 0).any(-1)
    return int(((slope.argmin(-1) == labels) == counted).sum())


def _mean(losses: Tensor, labels: Tensor) -> Tensor:
    """Mean of the losses over examples, or over counted tokens if an example has several."""
    losses = losses.detach().double()
    if labels.dim() == 1 or labels.is_floating_point():
        return losses.mean()
    counts = (labels != -100).flatten(1).sum(1).double()
    return (losses * counts).sum() / counts.sum().clamp(min=1)


def _require_same_loss(own: Tensor, losses: Tensor, labels: Tensor, argument: str) -> None:
    mean, kinds = _mean(losses, labels), {own.dtype, losses.dtype}
    # In half precision, the loss of an example and the mean are rounded to eps / 2, and on a CPU the sums between.
    rounding = max([max(2 * torch.finfo(kind).eps, 5e-3) if kind in _HALVES else 0.0 for kind in kinds])
    wide = 1e-4 if torch.float64 not in kinds or len(kinds) > 1 else 64 * torch.finfo(torch.float64).eps
    if not torch.isclose(own.detach().double(), mean, rtol=max(rounding, wide), atol=wide):
        raise ValueError(
            f"{argument}: the model's own loss is {own.item():.6g}, but cross entropy of its logits gives "
            f"{mean.item():.6g}; this model trains on another loss, so pass loss_fn(model, batch) -> losses[n]"
        )


def require_losses(losses: Any, argument: str) -> None:
    """Raise, as documented for `per_example_losses`, unless there is one finite loss per example."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"{argument}: losses must be a floating point tensor of shape [n], got {kind}")
    if losses.dim() != 1:
        raise ValueError(
            f"{argument}: expected one loss per example, shape [n], got shape {tuple(losses.shape)}; use "
            "reduction='none' and sum or average over everything but the examples"
        )
    if losses.shape[0] == 0:
        count = "m" if argument == "meta_batch" else "n"
        raise ValueError(f"{argument} has no examples ({count} = 0); at least one is needed")
    if not losses.requires_grad:
        raise ValueError(
            f"{argument}: the losses do not depend on any trainable parameter (all frozen, or computed under "
            "torch.no_grad or inference_mode)"
        )
    if host_may_wait() and not finite_sum(losses):
        bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{argument}: the losses of examples {bad[:10]} are not finite; nothing was changed")
