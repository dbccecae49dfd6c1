"""The operators on a GPU: time, bytes, operations, and their share of what the machine copies and multiplies.

The ceilings are measured beside them: a large copy, and a large product of the operands' dtype. Every implementation is
first held against the float64 reference within the budget of docs/numerics.md; over it there is no time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern import ops
from metakern.ops.select import OPERATORS
from metakern.testing.budget import unit, verdict

ROUNDS = 30


@dataclass(frozen=True)
class OpRow:
    """One implementation of one operator at one size; `target` is the figure it is meant to reach, None where none."""

    operator: str
    sizes: str
    dtype: str
    impl: str
    status: str
    microseconds: float | None = None
    microseconds_p20: float | None = None
    microseconds_p80: float | None = None
    baseline: str = ""
    baseline_microseconds: float | None = None
    speedup: float | None = None
    bytes: int | None = None
    flops: int | None = None
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    copy_gigabytes_per_second: float | None = None
    matrix_teraflops: float | None = None
    share_of_copy: float | None = None
    share_of_matrix: float | None = None
    target: str = ""
    budget_used: float | None = None


class OpCase(NamedTuple):
    """An operator at one size, what a user would write instead, and what it has to reach."""

    operator: str
    sizes: dict[str, int]
    dtype: torch.dtype
    arguments: Callable[[dict[str, int], torch.dtype, str], tuple[Any, ...]]
    baseline: str
    compose: Callable[..., Any]
    terms: int
    target: str = ""


def _normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator).to(dtype)


def matrices(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _normal(s["n"], s["t"], s["i"], dtype=dtype, device=device, seed=1),
        _normal(s["o"], s["i"], dtype=dtype, device=device, seed=2),
        _normal(s["n"], s["t"], s["o"], dtype=dtype, device=device, seed=3),
    )


def with_half_kept(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    A, _, B = matrices(s, dtype, device)
    return A, B, (torch.arange(s["n"], device=device) % 2).float()


def paired_matrices(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    A, _, B = matrices(s, dtype, device)
    return (
        *(A, B, _normal(s["s"], s["i"], dtype=dtype, device=device, seed=4)),
        _normal(s["s"], s["o"], dtype=dtype, device=device, seed=5),
    )


def _lookups(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    indices = torch.randint(0, s["v"], (s["n"], s["t"]), device=device, generator=generator)
    return (
        *(indices, _normal(s["v"], s["o"], dtype=dtype, device=device, seed=1)),
        _normal(s["n"], s["t"], s["o"], dtype=dtype, device=device, seed=2),
    )


def _two_rows(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    shape = tuple(s.values())
    return _normal(*shape, dtype=dtype, device=device, seed=1), _normal(*shape, dtype=dtype, device=device, seed=2)


def _multiply_and_sum(A: Tensor, V: Tensor, B: Tensor) -> Tensor:
    return ((A.flatten(0, 1) @ V.t()).view_as(B) * B).sum((1, 2))


def _full_product(A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    return B.flatten(0, 1).t() @ A.flatten(0, 1)


def _grams(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> Tensor:
    return ((A @ A_meta.t()) * (B @ B_meta.t())).sum((1, 2))


def _look_up(indices: Tensor, V: Tensor, B: Tensor) -> Tensor:
    return (F.embedding(indices, V) * B).sum((1, 2))


def _normalise(X: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return (F.layer_norm(X, X.shape[2:]) * B).sum(1), B.sum(1)


def _clip(dots: Tensor) -> Tensor:
    clipped = dots.clamp_min(0)
    total = clipped.sum()
    return clipped / (total + (total == 0))


def op_cases(small: bool) -> Iterator[OpCase]:
    """Every figure that the operators have to show has its case here; the small ones are for a dry run."""
    bf16, single = torch.bfloat16, torch.float32
    for width in (24,) if small else (768, 1024, 4096):
        sizes = dict(n=4, t=8, i=width, o=width) if small else dict(n=128, t=128, i=width, o=width)
        for dtype in (bf16, single):
            yield OpCase(
                *("direction_dots", sizes, dtype, matrices, "matmul, multiply, sum", _multiply_and_sum),
                sizes["t"] * width * width,
                "matrix >= 0.75, speedup >= 1.25" if dtype is bf16 else "",
            )
        yield OpCase(
            *("weighted_grad", sizes, bf16, with_half_kept, "matmul over all rows", _full_product),
            sizes["n"] * sizes["t"],
            "speedup >= 1.6",
        )
    one = dict(n=32, t=1, i=24, o=24) if small else dict(n=16384, t=1, i=1024, o=1024)
    yield OpCase("direction_dots", one, bf16, matrices, "matmul, multiply, sum", _multiply_and_sum, one["i"] * one["o"])
    long = dict(n=2, t=64, i=24, o=24) if small else dict(n=4, t=4096, i=1024, o=1024)
    terms = long["t"] * long["i"] * long["o"]
    yield OpCase("direction_dots", long, bf16, matrices, "matmul, multiply, sum", _multiply_and_sum, terms)
    pairs = dict(n=8, t=1, s=4, i=24, o=24) if small else dict(n=16384, t=1, s=64, i=4096, o=4096)
    yield OpCase(
        "pair_dots", pairs, bf16, paired_matrices, "two matmuls, multiply, sum", _grams, pairs["s"] * pairs["i"]
    )
    tokens = dict(n=4, t=8, v=11, o=24) if small else dict(n=128, t=512, v=50000, o=1024)
    norm = dict(n=4, t=8, i=24) if small else dict(n=128, t=512, i=1024)
    wide = dict(n=2, t=8, i=40) if small else dict(n=16, t=1024, i=4096)
    rows = dict(n=4, k=100) if small else dict(n=16384, k=4096)
    for dtype in (bf16, single):
        terms, copy = tokens["t"] * tokens["o"], "copy >= 0.8"
        yield OpCase("embedding_dots", tokens, dtype, _lookups, "embedding, multiply, sum", _look_up, terms, copy)
        for sizes in (norm, wide):
            baseline = "layer_norm, multiply, two sums"
            yield OpCase("affine_grads", sizes, dtype, _two_rows, baseline, _normalise, sizes["t"] * sizes["i"], copy)
        yield OpCase("row_dots", rows, dtype, _two_rows, "vecdot", torch.linalg.vecdot, rows["k"], copy)
    dots = dict(n=64 if small else 1024)
    yield OpCase(
        *("clip_normalise", dots, single, lambda s, d, device: (_normal(s["n"], dtype=d, device=device),)),
        *("clamp, sum, divide", _clip, dots["n"]),
    )


def bytes_of(case: OpCase, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> int:
    """What must be read and written once; of a table the rows that are looked up, of a batch the rows that are kept."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if case.operator == "embedding_dots":
        indices, V, B = tensors
        return indices.nbytes + B.nbytes + indices.unique().numel() * V[0].nbytes + outputs[0].nbytes
    if case.operator == "weighted_grad":
        A, B, w = tensors
        return (A.nbytes + B.nbytes) * int(w.count_nonzero()) // len(w) + w.nbytes + outputs[0].nbytes
    return sum(tensor.nbytes for tensor in (*tensors, *outputs))


def microseconds(call: Callable[[], Any], device: str, rounds: int = ROUNDS) -> list[float]:
    """Sorted times of single calls, on a GPU each with a cache that holds none of its operands."""
    for _ in range(3):
        call()
    if device == "cpu":
        return sorted(_elapsed(call) for _ in range(rounds))
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in marks:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(1e3 * start.elapsed_time(end) for start, end in marks)


def _elapsed(call: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


@cache
def copy_ceiling(device: str) -> float:
    """Gigabytes a second, read and written, of a large copy."""
    source = torch.zeros(2**18 if device == "cpu" else 2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(microseconds(lambda: target.copy_(source), device)) / 1e3


@cache
def matrix_ceiling(dtype: torch.dtype, device: str) -> float:
    """10^12 operations a second of a large product of the library, as PyTorch is set."""
    width = 64 if device == "cpu" else 8192
    a, b = (_normal(width, width, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    return 2 * width**3 / statistics.median(microseconds(lambda: a @ b, device)) / 1e6


def measure_op(case: OpCase, device: str) -> list[OpRow]:
    """A row for every implementation that supports the case."""
    operator = OPERATORS[case.operator]
    arguments = case.arguments(case.sizes, case.dtype, device)
    public = getattr(ops, case.operator)
    sizes = " ".join(f"{letter}={size}" for letter, size in case.sizes.items())
    blank = OpRow(case.operator, sizes, str(case.dtype).removeprefix("torch."), "", "measured", target=case.target)
    truth, scale = _truth(case, arguments)
    with torch.no_grad():
        base = statistics.median(microseconds(lambda: case.compose(*arguments), device))
        rows = []
        for impl, reason in operator.reasons(*arguments).items():
            if reason is not None:
                rows.append(replace(blank, impl=impl, status=f"not measured: {reason}"))
                continue
            outputs = _parts(public(*arguments, impl=impl))
            used = max(
                verdict(impl, got, want, unit(case.dtype, case.terms) * size).share
                for got, want, size in zip(outputs, truth, scale, strict=True)
            )
            if not used <= 1:
                rows.append(replace(blank, impl=impl, status="not measured: over the error budget", budget_used=used))
                continue
            times = microseconds(lambda impl=impl: public(*arguments, impl=impl), device)
            rows.append(_figures(case, replace(blank, impl=impl, budget_used=used), times, base, arguments, outputs))
    return rows


def _figures(
    case: OpCase, row: OpRow, times: list[float], base: float, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]
) -> OpRow:
    device, median = outputs[0].device.type, statistics.median(times)
    moved, flops = bytes_of(case, arguments, outputs), OPERATORS[case.operator].contract.flops(*arguments)
    copy, matrix = copy_ceiling(device), matrix_ceiling(case.dtype, device)
    return replace(
        row,
        microseconds=median,
        microseconds_p20=times[len(times) // 5],
        microseconds_p80=times[len(times) * 4 // 5],
        baseline=case.baseline,
        baseline_microseconds=base,
        speedup=base / median,
        bytes=moved,
        flops=flops,
        gigabytes_per_second=moved / median / 1e3,
        teraflops=flops / median / 1e6,
        copy_gigabytes_per_second=copy,
        matrix_teraflops=matrix,
        share_of_copy=moved / median / 1e3 / copy,
        share_of_matrix=flops / median / 1e6 / matrix,
    )


def _truth(case: OpCase, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The float64 reference, and the scale its errors are judged against: the same of absolute values."""
    exact = tuple(a.double() if a.is_floating_point() else a for a in arguments)
    operator = OPERATORS[case.operator]
    truth = _parts(operator(*exact, impl="reference"))
    if case.operator == "clip_normalise":
        return truth, truth
    if case.operator == "affine_grads":
        X, B = exact
        normalised = X.abs() / torch.sqrt(X.square().mean(2, keepdim=True) + 1e-5)
        return truth, ((B.abs() * (normalised + 1)).sum(1), B.abs().sum(1))
    sizes = tuple(a.abs() if a.is_floating_point() else a for a in exact)
    return truth, _parts(operator(*sizes, impl="reference"))


def _parts(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def measure_ops(device: str, minutes: float, only: str = "") -> list[OpRow]:
    """All cases that the time allows; one that fails or comes too late gets a row that says so."""
    deadline = time.perf_counter() + 60 * minutes
    rows: list[OpRow] = []
    for case in op_cases(small=device == "cpu"):
        if only not in case.operator:
            continue
        sizes = " ".join(f"{letter}={size}" for letter, size in case.sizes.items())
        missing = OpRow(case.operator, sizes, str(case.dtype).removeprefix("torch."), "all", "", target=case.target)
        if time.perf_counter() > deadline:
            rows.append(replace(missing, status="not measured: out of time"))
            continue
        try:
            found = measure_op(case, device)
        except RuntimeError as error:
            found = [replace(missing, status=f"not measured: {str(error).splitlines()[0][:160]}")]
        rows += found
        print("\n".join(map(line, found)), flush=True)
    return rows


def line(row: OpRow) -> str:
    """A row as a person reads it."""
    head = f"{row.operator:15} {row.sizes:32} {row.dtype:9} {row.impl:10}"
    if row.microseconds is None or row.speedup is None or row.share_of_copy is None or row.share_of_matrix is None:
        return f"{head} {row.status}"
    return (
        f"{head} {row.microseconds:9.1f} us, {row.speedup:5.2f} x {row.baseline}; copy {row.share_of_copy:.2f}, "
        f"matrix {row.share_of_matrix:.2f}" + (f" (to reach: {row.target})" if row.target else "")
    )
