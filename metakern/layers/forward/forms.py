"""Replacements for torch functions: the same values, by operations that can be differentiated in more ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.nn.attention import SDPBackend, sdpa_kernel

from metakern.capture.refusal import EngineUnavailable
from metakern.capture.repeatable import RECURRENT, without_cudnn
from metakern.capture.unrolled import LastingMode
from metakern.layers.forward.bag_parts import bags


def _distances(x1: Tensor, x2: Tensor, p: float = 2.0, *_: Any, **__: Any) -> Tensor:
    """As torch.cdist, [..., rows of x1, rows of x2]; as there, the derivative at distance zero is zero."""
    apart = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    same = (apart == 0).all(-1)
    norms = torch.linalg.vector_norm(apart.masked_fill(same.unsqueeze(-1), 1.0), p, dim=-1)
    return norms.masked_fill(same, 0.0)


def _normalised_weight(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Weight normalisation, g v / |v| with one |v| for each index along `dim`, or for -1 a single one; torch's has no
    forward mode, and a wrong second derivative with respect to v (2.13, on a CPU).
    """
    others = [d for d in range(v.dim()) if d != dim]  # -1 is none of them
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _whole_logits(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """`linear_cross_entropy` in one piece: in parts, it silently loses tangents and has no second derivative."""
    return F.linear_cross_entropy(*args, **kwargs)


TWICE_DIFFERENTIABLE: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.embedding_bag: bags,
    torch.cdist: _distances,
    torch._weight_norm: _normalised_weight,  # type: ignore[attr-defined]
    **({F.linear_cross_entropy: _whole_logits} if hasattr(F, "linear_cross_entropy") else {}),
}


class Forms(LastingMode):
    """While active, replaces the functions that are keys of `forms` by their values."""

    def __init__(self, forms: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._forms = forms

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._forms.get(func, func)(*args, **kwargs)


class _TwiceDifferentiable(Forms):
    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(func, HigherOrderOperator) and torch.is_grad_enabled():
            raise EngineUnavailable(
                f"the gradient of torch's operator {func} cannot be differentiated again, and torch does not report "
                "it; write it in plain Python"
            )
        # whose recurrent layers have no second derivative
        with without_cudnn() if func in RECURRENT else nullcontext():
            return super().call(func, args, kwargs)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside the block, attention, bags and recurrent layers take forms that have second derivatives; branches and
    loops that are operators (`torch.cond`, scans), which have none, are rejected.

    Raises: EngineUnavailable
    """
    with sdpa_kernel(SDPBackend.MATH), _TwiceDifferentiable(TWICE_DIFFERENTIABLE):
        yield
