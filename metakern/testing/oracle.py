"""The truth that everything else is judged by: one backward per example, in float64, with nothing clever in it.

It shares no code with the library: its own default loss, its own weight rule, its own loop.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_COPIED = (torch.strided, torch.sparse_coo, torch.jagged)
"""Layouts that `copy.deepcopy` takes."""

LossFn = Callable[[nn.Module, Any], Tensor]
Select = Callable[[Any, int], Any]


@dataclass(frozen=True)
class Oracle:
    """dots[n] = <g_n, v>, weights[n] = max(dots, 0) / sum, losses[n], meta_loss[], example_norms[n] = |g_n|,
    meta_norm = |v|.

    g_n is the gradient of example n's loss, v the gradient of the mean meta loss, both over the trainable parameters.
    """

    dots: Tensor
    weights: Tensor
    losses: Tensor
    meta_loss: Tensor
    example_norms: Tensor
    meta_norm: Tensor
    example_gradient: Callable[[int], dict[str, Tensor]]

    def gradient(self, weights: Tensor) -> dict[str, Tensor]:
        """sum_n weights_n g_n, by parameter name; computed again example by example, so that no more than one g_n is
        held.
        """
        total = {name: torch.zeros_like(grad) for name, grad in self.example_gradient(0).items()}
        for n, weight in enumerate(weights.to(self.dots).tolist()):
            if weight != 0.0:
                for name, grad in self.example_gradient(n).items():
                    total[name] += weight * grad
        return total

    def gradient_scale(self, weights: Tensor) -> Tensor:
        """sum_n |weights_n||g_n|: the size that the weighted gradient would have if nothing cancelled."""
        return (weights.to(self.dots).abs() * self.example_norms).sum()


def oracle(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    loss_fn: LossFn | None = None,
    names: Collection[str] | None = None,
    interacting: bool = False,
    select: Select | None = None,
    dtype: torch.dtype = torch.float64,
) -> Oracle:
    """Dots, weights and gradients of a re-weighted step, by a loop over single examples of a copy of `model` in
    `dtype`.

    `names` restricts the parameters; `select(batch, n)` returns example n as a batch of one (default: row n of every
    tensor, so time-major batches need their own). `interacting=True` is for models whose examples see each other
    (BatchNorm in train mode): g_n is then the gradient of entry n of the whole batch's losses, meta batch likewise,
    and nothing is sliced. `model` and the generators' states are left alone.

    Raises: ValueError for a model in train mode with dropout: a mask cannot be drawn again example by example.
    """
    _refuse_dropout(model)
    replica = copy_of(model).to(dtype)
    per_example = loss_fn or default_loss
    batch, meta_batch = (tree_map(lambda leaf: _cast(leaf, dtype), each) for each in (batch, meta_batch))
    params = {
        name: param
        for name, param in replica.named_parameters()
        if param.requires_grad and (names is None or name in names)
    }
    losses = _losses(replica, batch, per_example, interacting, select or _row)
    meta_losses = _losses(replica, meta_batch, per_example, interacting, select or _row)

    direction, meta_loss = _mean_gradient(meta_losses, params)
    values, dots, norms = [], [], []
    for loss_of in losses:
        loss = loss_of()
        grads = _gradient(loss, params)
        values.append(loss.detach())
        dots.append(_inner(grads, direction))
        norms.append(_inner(grads, grads).sqrt())
    stacked = torch.stack(dots)
    return Oracle(
        dots=stacked,
        weights=clip_normalise(stacked),
        losses=torch.stack(values),
        meta_loss=meta_loss,
        example_norms=torch.stack(norms),
        meta_norm=_inner(direction, direction).sqrt(),
        example_gradient=lambda n: _gradient(losses[n](), params),
    )


def clip_normalise(dots: Tensor) -> Tensor:
    """weights_n = max(dots_n, 0) / (sum + [sum == 0]). Source: Ren et al., ICML 2018, algorithm 1, line 11."""
    kept = dots.clamp_min(0)
    total = kept.sum()
    return kept / (total if total > 0 else 1.0)


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy per example of `(inputs, targets)`, or of a mapping given to the model by keyword with its
    "labels".
    """
    if isinstance(batch, Mapping):
        output, targets = model(**batch), batch["labels"]
    else:
        inputs, targets = batch
        output = model(inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise TypeError(f"the oracle's default loss needs logits, got {type(output).__name__}; pass loss_fn")
    return F.cross_entropy(logits, targets, reduction="none")


def _losses(
    model: nn.Module, batch: Any, loss_fn: LossFn, interacting: bool, select: Select
) -> Sequence[Callable[[], Tensor]]:
    """One function per example that returns its loss with a graph."""
    if interacting:
        values = loss_fn(model, batch)
        return [lambda n=n: values[n] for n in range(len(values))]
    with torch.no_grad():
        size = len(loss_fn(model, batch))
    return [lambda n=n: loss_fn(model, select(batch, n)).squeeze() for n in range(size)]


def _gradient(loss: Tensor, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(
        loss, list(params.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return {name: grad.to_dense() if grad.is_sparse else grad for name, grad in zip(params, grads, strict=True)}


def _inner(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    return torch.stack([(left[name] * right[name]).sum() for name in left]).sum()


def _mean_gradient(
    losses: Sequence[Callable[[], Tensor]], params: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], Tensor]:
    """Mean of the gradients and of the losses; a running sum, since m gradients may not fit side by side."""
    total = {name: torch.zeros_like(param) for name, param in params.items()}
    values = []
    for loss_of in losses:
        loss = loss_of()
        values.append(loss.detach())
        for name, grad in _gradient(loss, params).items():
            total[name] += grad / len(losses)
    return total, torch.stack(values).mean()


def _row(batch: Any, n: int) -> Any:
    return tree_map(lambda leaf: leaf[n : n + 1] if isinstance(leaf, Tensor) else leaf, batch)


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.detach().to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
        if module.training and isinstance(rate, float) and rate > 0:
            where = name or "the model"
            raise ValueError(f"model: the oracle cannot draw the dropout mask of {where} again; set its rate to 0")


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of the model. Tensors that it keeps of its last forward pass (a pruned weight, an auxiliary loss) are
    cloned without their graph, and so are sparse rows (CSR), since `copy.deepcopy` takes neither.
    """
    kept = (leaf for module in model.modules() for leaf in tree_leaves(vars(module)))
    apart = [t for t in kept if isinstance(t, Tensor) and (not t.is_leaf or t.layout not in _COPIED)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in apart})
