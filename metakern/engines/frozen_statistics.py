"""An approximation, on request: dots of a model in training mode with its batch statistics treated as constants.

    x^_nc = (x_nc - mu_c) / sqrt(sigma_c^2 + eps)      mu, sigma^2 of this batch, as in any training step
    dots_n = <g_n, V>      g_n without the derivatives of mu and sigma, so that no example sees another: ghost applies
    .grad  = d/dtheta sum_n weights_n l_n      with them: exact for the weights that were found

Leaving the statistics out of the training gradient would let parameters before a normalisation drift without effect on
the loss (Ioffe & Szegedy, Batch Normalization, ICML 2015, section 2); leaving them out of the dots only changes the
weights. Both use one forward pass: the backward of the normalisation is told which derivative is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from metakern.capture.losses import evaluate_losses
from metakern.capture.refusal import EngineUnavailable
from metakern.engines.ghost import GhostPass
from metakern.engines.micro_batch import Along
from metakern.engines.problem import Answer, Problem


class _Batch(NamedTuple):
    """Statistics of one normalisation, [C] each."""

    mean: Tensor
    inverse_deviation: Tensor
    eps: float


class _Statistics(TorchFunctionMode):
    """Normalisations in call order: the first pass takes the statistics, later passes reuse them."""

    def __init__(self) -> None:
        super().__init__()
        self.differentiated = False
        self._known: list[_Batch] = []
        self._place, self._complete = 0, False

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        self._place = 0
        with self:
            yield
        self._complete = True

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training or input.numel() == input.shape[1]:  # torch raises its own error for one value per channel
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        hooks = _top_saved_tensors_default_hooks(False)
        if hooks is not None and hooks[0].__module__ == checkpoint.__name__:
            raise EngineUnavailable(
                "batch normalisation in checkpointed layers runs again in the backward pass, where its statistics "
                "cannot be frozen; leave out batchnorm='frozen'"
            )
        if not self._complete:
            self._known.append(_taken(input, running_mean, running_var, momentum, eps))
        found = self._known[self._place]
        self._place += 1
        normalised = _Normalise.apply(input, found, self)
        zero = torch.zeros_like(found.mean if weight is None else weight)
        return F.batch_norm(normalised, zero, torch.full_like(zero, 1 - _EPS), weight, bias, False, 0.0, _EPS)


_EPS = 2.0**-20  # torch 2.11 rejects 0; variance 1 - eps plus eps is exactly 1


def _taken(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> _Batch:
    """The statistics of this batch; running statistics are updated as in any training step."""
    with torch.no_grad():
        _, mean, inverse = torch.ops.aten.native_batch_norm(
            input, None, None, running_mean, running_var, True, momentum, eps
        )
    return _Batch(mean, inverse, eps)


class _Normalise(torch.autograd.Function):
    """x -> x^ with given statistics, whose dependence on x counts in the backward pass only on request."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: _Batch, statistics: _Statistics) -> Tensor:
        ctx.save_for_backward(x)
        ctx.batch, ctx.statistics = batch, statistics
        wide = x.to(batch.mean.dtype)
        return ((wide - _along(batch.mean, x)) * _along(batch.inverse_deviation, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        mean, inverse, eps = ctx.batch
        if not ctx.statistics.differentiated:
            return (grad * _along(inverse, x)).to(x.dtype), None, None
        found = torch.ops.aten.native_batch_norm_backward(
            grad.contiguous(), x.contiguous(), None, None, None, mean, inverse, True, eps, [True, False, False]
        )
        return found[0], None, None


def _along(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (x.dim() - 2))


class _Train(NamedTuple):
    """Marks the train batch; the meta batch is normalised as usual."""

    batch: Any


def solve(problem: Problem, along: Along) -> Answer:
    """Approximate dots along `along(V)`, by ghost; an exact weighted gradient, by a second backward pass.

    Raises: EngineUnavailable: examples interact by more than batch normalisation, or ghost cannot handle the model.
    """
    statistics = _Statistics()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, _Train):
            return evaluate_losses(model, batch, problem.loss_fn, "meta_batch")
        with statistics.one_pass():
            return evaluate_losses(model, batch.batch, problem.loss_fn, "batch")

    batch = _Train(problem.batch)
    train = GhostPass(replace(problem, batch=batch, loss_fn=losses, memory="two_pass", compared=False))
    meta_loss, v = problem.meta_gradient()
    dots = train.dots(along(v))

    def weighted_gradient(weights: Tensor) -> dict[str, Tensor]:
        statistics.differentiated = True
        return train.weighted_gradient(weights)

    return Answer(dots, train.losses, meta_loss, weighted_gradient)
