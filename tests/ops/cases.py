"""The operators' cases, declared once: arguments by size and dtype, and the scale that errors are judged against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakern import ops
from metakern.testing.inputs import labels, normal

Sizes = tuple[int, ...]


class Case(NamedTuple):
    """How to test one operator: sizes worth trying, arguments of those sizes, the budget's scale and terms."""

    sizes: tuple[Sizes, ...]
    arguments: Callable[[Sizes, torch.dtype], tuple[Any, ...]]
    scale: Callable[..., Tensor | tuple[Tensor, ...]]
    terms: Callable[[Sizes], int]
    far: bool = True  # the first operand may have examples far apart


def _affine_grads(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    n = sizes[0]
    return normal(*sizes, seed=1, dtype=dtype), normal(*sizes, seed=2, dtype=dtype), 1e-2, n % 2 == 1, n != 2


def _affine_scale(X: Tensor, B: Tensor, eps: float, centred: bool, shift: bool) -> tuple[Tensor, Tensor]:
    """sum |B| (|x^| + 1), since the mean of x^ is rounded too, and sum |B|."""
    normalised = X.abs() / torch.sqrt(X.square().mean(2, keepdim=True) + eps)
    sums = B.abs().sum(1)
    return (B.abs() * (normalised + 1)).sum(1), sums if shift else sums[:, :0]


def _clip_normalise(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (normal(*sizes, dtype=dtype),)


def _cross_entropy_rows(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    """Every third row is ignored; where there are many classes, one has a logit of -inf, as masked ones have."""
    rows, classes = sizes
    logits, targets = 5 * normal(rows, classes, seed=1, dtype=dtype), labels(rows, classes=classes, seed=2)
    targets[1::3] = -100
    if classes > 1000:
        logits[:, 2], targets[targets == 2] = -torch.inf, 3
    return logits, targets, -100, 0.1 if classes < 1000 else 0.0


def _cross_entropy_rows_backward(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    logits, targets, *settings = _cross_entropy_rows(sizes, dtype)
    _, highs, sums = ops.cross_entropy_rows(logits, targets, impl="reference")
    return logits, targets, highs, sums, normal(sizes[0], seed=3, dtype=highs.dtype), *settings


def _cross_entropy_scale(logits: Tensor, targets: Tensor, ignored: int, smoothing: float) -> tuple[Tensor, ...]:
    """Of a loss the largest finite logit, whose differences are rounded; of the sum every term and its exponent."""
    largest = logits.masked_fill(logits.isinf(), 0).abs().amax(1)
    exponents = (logits - logits.amax(1, keepdim=True)).clamp(min=-1000)
    return largest + 1, largest, (exponents.exp() * (1 - exponents)).sum(1)


def _cross_entropy_backward_scale(
    logits: Tensor, targets: Tensor, highs: Tensor, sums: Tensor, grad: Tensor, ignored: int, smoothing: float
) -> Tensor:
    """What is added up: the share of a class, with the rounding of its exponent, and one for the target; or where
    float16 runs out of normal numbers their smallest."""
    exponents = (logits - highs.unsqueeze(1)).clamp(min=-1000)
    shares = exponents.exp() / sums.unsqueeze(1) * (1 - exponents)
    hit = torch.arange(logits.shape[1]) == targets.unsqueeze(1)
    terms = (shares + hit + smoothing / logits.shape[1]) * grad.abs().unsqueeze(1)
    return terms.clamp_min(torch.finfo(torch.float16).smallest_normal)


def _direction_dots(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    n, t, i, o = sizes
    return (
        normal(n, t, i, seed=1, dtype=dtype),
        normal(o, i, seed=2, dtype=dtype),
        normal(n, t, o, seed=3, dtype=dtype),
    )


def _pair_dots(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Six sizes tell the meta examples apart."""
    n, t, *meta, i, o = sizes
    shapes = ((n, t, i), (n, t, o), (*meta, i), (*meta, o))
    return tuple(normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))


def _embedding_dots(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    n, t, rows, width = sizes
    indices = labels(n, t, classes=rows, seed=1)
    return indices, normal(rows, width, seed=2, dtype=dtype), normal(n, t, width, seed=3, dtype=dtype), 1


def _embedding_scale(indices: Tensor, V: Tensor, B: Tensor, padding_idx: int) -> Tensor:
    return (V[indices] * B).abs().sum((1, 2))


def _row_dots(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return normal(*sizes, seed=1, dtype=dtype), normal(*sizes, seed=2, dtype=dtype)


def _weighted_grad(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    n, t, i, o = sizes
    w = normal(n, seed=3, dtype=torch.float32).clamp_min(0)  # about half are zero
    start = (normal(o, i, seed=4, dtype=dtype),) if n in (0, 7) else ()
    return normal(n, t, i, seed=1, dtype=dtype), normal(n, t, o, seed=2, dtype=dtype), w, n != 5, *start


def _kernel_grads(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    """Sizes are n, dimensions of space, channels in and out, pixels and window a side, then the four settings."""
    n, spatial, i, o, pixels, window, stride, padding, dilation, groups = sizes
    outputs = (pixels + 2 * padding - dilation * (window - 1) - 1) // stride + 1
    A, B, kernel = (
        normal(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate((
            (n, i, *[pixels] * spatial), (n, o, *[outputs] * spatial), (o, i // groups, *[window] * spatial)
        ))
    )  # fmt: skip
    settings = ([value] * spatial for value in (stride, padding, dilation))
    return A, B, kernel, *settings, groups, n != 5


def _kernel_grads_scale(A: Tensor, B: Tensor, kernel: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return ops.kernel_grads(A.abs(), B.abs(), kernel, *settings[:-1], bias=settings[-1], impl="reference")


def _weighted_kernel_grad(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    A, B, *others = _kernel_grads(sizes, dtype)
    return A, B, normal(sizes[0], seed=3, dtype=torch.float32).clamp_min(0), *others


def _weighted_kernel_scale(A: Tensor, B: Tensor, w: Tensor, kernel: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return ops.weighted_kernel_grad(
        A.abs(), B.abs(), w, kernel, *settings[:-1], bias=settings[-1], impl="reference"
    )  # fmt: skip


def _clip_scale(dots: Tensor) -> Tensor:
    """The weight itself, or where float16 runs out of normal numbers their smallest."""
    clipped = dots.clamp_min(0)
    weights = clipped / clipped.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return weights.clamp_min(torch.finfo(torch.float16).smallest_normal)


def _direction_scale(A: Tensor, V: Tensor, B: Tensor) -> Tensor:
    """sum_t |B_nt| |V| |A_nt|: the product V A is rounded entry by entry before it meets B."""
    return torch.einsum("nti,oi,nto->n", A.abs(), V.abs(), B.abs())


def _pair_scale(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> Tensor:
    inputs = torch.einsum("nti,...si->n...ts", A.abs(), A_meta.abs())
    return torch.einsum("n...ts,nto,...so->n...", inputs, B.abs(), B_meta.abs())


def _weighted_scale(A: Tensor, B: Tensor, w: Tensor, bias: bool, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shift = torch.einsum("nto,n->o", B.abs(), w.abs())
    matrix = torch.einsum("nti,nto,n->oi", A.abs(), B.abs(), w.abs())
    return matrix if start is None else matrix + start.abs(), shift if bias else shift[:0]


_MATRICES = ((0, 3, 4, 5), (1, 0, 4, 5), (1, 1, 1, 1), (7, 1, 33, 17), (5, 3, 20, 70), (3, 130, 65, 9))
_CONVOLUTIONS = (
    (0, 2, 3, 4, 5, 3, 1, 1, 1, 1),
    (1, 1, 1, 1, 1, 1, 1, 0, 1, 1),
    (5, 1, 4, 6, 17, 3, 2, 1, 2, 2),
    (3, 3, 2, 3, 5, 2, 1, 1, 1, 1),
    (40, 2, 3, 32, 32, 3, 1, 1, 1, 1),
    (7, 2, 6, 4, 9, 3, 1, 0, 1, 1),
)
_ROWS = ((0, 3), (1, 1), (5, 2), (7, 33), (4, 64), (5, 2057), (40, 100))

CASES = {
    "affine_grads": Case(
        (
            *((0, 3, 4), (1, 0, 4), (2, 1, 1), (3, 5, 33), (2, 9, 700), (1, 3, 4096)),
            *((1, 6, 256), (2, 5, 512), (1, 9, 1024), (2, 3, 2048), (4, 40, 100)),  # widths of kernels of their own
        ),
        _affine_grads,
        _affine_scale,
        lambda s: s[1] * s[2],
    ),
    "clip_normalise": Case(((0,), (1,), (5,), (1000,)), _clip_normalise, _clip_scale, lambda s: s[0], far=False),
    "cross_entropy_rows": Case(_ROWS, _cross_entropy_rows, _cross_entropy_scale, lambda s: s[1]),
    "cross_entropy_rows_backward": Case(
        _ROWS, _cross_entropy_rows_backward, _cross_entropy_backward_scale, lambda s: s[1]
    ),
    "direction_dots": Case(_MATRICES, _direction_dots, _direction_scale, lambda s: s[1] * s[2] * s[3]),
    "embedding_dots": Case(
        ((0, 3, 4, 5), (1, 0, 4, 5), (1, 1, 2, 1), (3, 7, 5, 63), (2, 150, 11, 200)),
        _embedding_dots,
        _embedding_scale,
        lambda s: s[1] * s[3],
        far=False,
    ),
    "kernel_grads": Case(_CONVOLUTIONS, _kernel_grads, _kernel_grads_scale, lambda s: s[4] ** s[1]),
    "pair_dots": Case(
        (
            *((0, 3, 2, 4, 5), (2, 3, 0, 4, 5), (1, 1, 1, 1, 1), (7, 1, 19, 33, 17)),
            *((2, 3, 0, 1, 4, 5), (2, 3, 4, 0, 4, 5), (3, 1, 1, 1, 1, 1), (7, 1, 70, 1, 33, 17), (70, 2, 9, 3, 8, 5)),
            *((2, 5, 3, 70, 9, 33), (3, 6, 1, 40, 7, 9), (3, 130, 5, 65, 9)),
        ),
        _pair_dots,
        _pair_scale,
        lambda s: s[1] * s[-3] * max(s[-2:]),
    ),
    "row_dots": Case(
        ((0, 3), (2, 0), (1, 1), (3, 63), (5, 64), (7, 1000), (2, 40001)),
        _row_dots,
        lambda X, Y: (X * Y).abs().sum(1),
        lambda s: s[1],
    ),
    "weighted_grad": Case((*_MATRICES, (3, 300, 260, 5)), _weighted_grad, _weighted_scale, lambda s: s[0] * s[1]),
    "weighted_kernel_grad": Case(
        _CONVOLUTIONS,
        _weighted_kernel_grad,
        _weighted_kernel_scale,
        lambda s: s[0] * s[4] ** s[1],
    ),
}
