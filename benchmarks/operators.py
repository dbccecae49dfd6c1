"""Each operator beside the torch calls that it replaces, written as quickly as those go, and the same compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import compositions
from benchmarks.gate import Shares
from benchmarks.providers import Outcome, Step
from metakern import ops
from metakern.testing import budget
from metakern.testing.inputs import labels, normal

Arguments = tuple[Any, ...]
Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class OperatorCase:
    """An operator at a size of the step cases; `arguments(dtype)` are seeded. A name stands for one size.

    What takes less than a millisecond is timed as `calls` in a row: a single call would wait for code that the
    collector and the other ways have put out of the caches.
    """

    name: str
    shapes: str
    operator: Callable[..., Result]
    composition: Callable[..., Result]
    arguments: Callable[[torch.dtype], Arguments]
    calls: int = 1


def _clip(dots: Tensor) -> Tensor:
    kept = dots.clamp_min(0)
    total = kept.sum()
    return kept / torch.where(total > 0, total, torch.ones_like(total))


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses, backward = torch.func.vjp(lambda given: F.cross_entropy(given, targets, reduction="none"), logits)
    return losses, backward(torch.ones_like(losses))[0]


def _cross_entropy_by_operators(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses, highs, sums = ops.cross_entropy_rows(logits, targets)
    return losses, ops.cross_entropy_rows_backward(logits, targets, highs, sums, torch.ones_like(losses))


def _row(X: Tensor, Y: Tensor) -> Tensor:
    return (X * Y).sum(1)


def _weighted(A: Tensor, B: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    scaled = (B * w.to(B.dtype).view(-1, 1, 1)).flatten(0, 1)
    return scaled.T @ A.flatten(0, 1), scaled.sum(0)


def _kernel_gradients(A: Tensor, B: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    return compositions.kernel_gradients(A, B, kernel, [1, 1], [1, 1]), B.sum((2, 3))


def _weighted_kernel(A: Tensor, B: Tensor, w: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    _, grad, shift = torch.ops.aten.convolution_backward(
        B * w.to(B.dtype).view(-1, 1, 1, 1),
        A,
        kernel,
        [64],
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        1,
        (False, True, True),
    )
    return grad, shift


def _normals(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], Arguments]:
    return lambda dtype: tuple(normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))


def _mostly_zero(n: int) -> Tensor:
    """Weights of which two in five are kept."""
    return normal(n, seed=9, dtype=torch.float32).abs() * (torch.arange(n) % 5 < 2)


OPERATORS = [
    OperatorCase(
        "affine_grads",
        "n=64 t=64 i=256",
        ops.affine_grads,
        compositions.affine,
        _normals((64, 64, 256), (64, 64, 256)),
        calls=10,
    ),
    OperatorCase("clip_normalise", "n=1024", ops.clip_normalise, _clip, _normals((1024,)), calls=1000),
    *(
        OperatorCase(
            f"cross_entropy_rows C={classes}",
            f"r={rows} C={classes} with gradient",
            _cross_entropy_by_operators,
            _cross_entropy,
            lambda dtype, rows=rows, classes=classes: (
                normal(rows, classes, dtype=dtype),
                labels(rows, classes=classes, seed=1),
            ),
        )
        for rows, classes in ((2048, 512), (512, 32000))
    ),
    OperatorCase(
        "direction_dots",
        "n=64 t=64 i=256 o=1024",
        ops.direction_dots,
        compositions.direction,
        _normals((64, 64, 256), (1024, 256), (64, 64, 1024)),
    ),
    OperatorCase(
        "embedding_dots",
        "n=64 t=64 rows=1000 i=256",
        ops.embedding_dots,
        compositions.embedding,
        lambda dtype: (
            labels(64, 64, classes=1000, seed=1),
            normal(1000, 256, seed=2, dtype=dtype),
            normal(64, 64, 256, seed=3, dtype=dtype),
        ),
        calls=10,
    ),
    OperatorCase(
        "kernel_grads",
        "n=128 i=64 o=64 32x32 3x3",
        partial(ops.kernel_grads, padding=1, bias=True),
        _kernel_gradients,
        _normals((128, 64, 32, 32), (128, 64, 32, 32), (64, 64, 3, 3)),
    ),
    OperatorCase(
        "pair_dots",
        "n=1024 t=1 s=32 i=1024 o=1024",
        ops.pair_dots,
        compositions.pairs,
        _normals((1024, 1, 1024), (1024, 1, 1024), (32, 1024), (32, 1024)),
        calls=10,
    ),
    OperatorCase(
        "pair_dots s=512",
        "n=64 t=64 s=512 i=256 o=1024",
        ops.pair_dots,
        compositions.pairs,
        _normals((64, 64, 256), (64, 64, 1024), (512, 256), (512, 1024)),
    ),
    OperatorCase(
        "pair_dots by meta example",
        "n=1024 t=1 m=32 s=1 i=1024 o=1024",
        ops.pair_dots,
        compositions.pairs_of_each,
        _normals((1024, 1, 1024), (1024, 1, 1024), (32, 1, 1024), (32, 1, 1024)),
        calls=10,
    ),
    OperatorCase(
        "pair_dots by meta example s=64",
        "n=32 t=64 m=8 s=64 i=256 o=768",
        ops.pair_dots,
        compositions.pairs_of_each,
        _normals((32, 64, 256), (32, 64, 768), (8, 64, 256), (8, 64, 768)),
    ),
    OperatorCase("row_dots", "n=4096 k=1024", ops.row_dots, _row, _normals((4096, 1024), (4096, 1024)), calls=10),
    OperatorCase(
        "weighted_grad",
        "n=64 t=64 i=256 o=1024 kept=0.4",
        partial(ops.weighted_grad, bias=True),
        _weighted,
        lambda dtype: (*_normals((64, 64, 256), (64, 64, 1024))(dtype), _mostly_zero(64)),
    ),
    OperatorCase(
        "weighted_kernel_grad",
        "n=64 i=64 o=64 32x32 3x3 kept=0.4",
        partial(ops.weighted_kernel_grad, padding=1, bias=True),
        _weighted_kernel,
        lambda dtype: (
            *_normals((64, 64, 32, 32), (64, 64, 32, 32))(dtype),
            _mostly_zero(64),
            normal(64, 64, 3, 3, seed=8, dtype=dtype),
        ),
    ),
]


@dataclass(frozen=True)
class Answered(Outcome):
    """An outcome that is an operator's result."""

    result: tuple[Tensor, ...] = ()


def ways(case: OperatorCase) -> dict[str, Callable[[], Step]]:
    """The composition, which is the unit; the same by torch.compile; the operator; each step makes all its calls."""
    given = case.arguments(torch.float32)

    def step_of(function: Callable[..., Result]) -> Step:
        def step() -> Outcome:
            with torch.no_grad():
                for _ in range(case.calls - 1):
                    function(*given)
                return Answered(result=_tuple(function(*given)))

        return step

    def compiled() -> Step:
        return step_of(torch.compile(case.composition, dynamic=False))

    return {
        "composition": lambda: step_of(case.composition),
        "composition compiled": compiled,
        "metakern": lambda: step_of(case.operator),
    }


def judge(case: OperatorCase) -> Callable[[Outcome], Shares]:
    """Against the composition in float64: twice what that loses in float32 is allowed, and 8 eps of the largest."""
    truth = _tuple(case.composition(*case.arguments(torch.float64)))
    plain = _tuple(case.composition(*case.arguments(torch.float32)))
    allowed = [budget.beside_plain(p, t, float(t.abs().max())) for p, t in zip(plain, truth, strict=True)]

    def shares(outcome: Outcome) -> Shares:
        assert isinstance(outcome, Answered)
        checked = zip(outcome.result, truth, allowed, strict=True)
        return Shares(max(budget.verdict(case.name, got, want, most).share for got, want, most in checked), 0.0)

    return shares


def _tuple(result: Result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
