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

from benchmarks import compositions
from metakern import ops
from metakern.layers.precision import _eight_bits
from metakern.ops.operands import EIGHT_BITS
from metakern.ops.select import OPERATORS
from metakern.testing.budget import beside_plain, unit, verdict

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


def _as_they_are(*arguments: Any) -> tuple[Any, ...]:
    return arguments


class OpCase(NamedTuple):
    """An operator at one size, what a user would write instead, and what it has to reach.

    `prepare` is done to the arguments first, in the time of the operator and not in that of the composition.
    """

    operator: str
    sizes: dict[str, int]
    dtype: torch.dtype
    arguments: Callable[[dict[str, int], torch.dtype, str], tuple[Any, ...]]
    baseline: str
    compose: Callable[..., Any]
    terms: int
    target: str = ""
    prepare: Callable[..., tuple[Any, ...]] = _as_they_are


def _normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator).to(dtype)


def matrices(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _normal(s["n"], s["t"], s["i"], dtype=dtype, device=device, seed=1),
        _normal(s["o"], s["i"], dtype=dtype, device=device, seed=2),
        _normal(s["n"], s["t"], s["o"], dtype=dtype, device=device, seed=3),
    )


def eight_bits(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    A, V, B = matrices(s, torch.bfloat16, device)
    return A.to(dtype), V.to(dtype), B


def sixteen_bits(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    return matrices(s, torch.bfloat16, device)


def _rounded(A: Tensor, V: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `dot_precision="fp8"` does it."""
    return _eight_bits(A)[0], _eight_bits(V)[0], B


def with_half_kept(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    A, _, B = matrices(s, dtype, device)
    return A, B, (torch.arange(s["n"], device=device) % 2).float()


def convolved(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Windows of 3 x 3, padded; every second example has a weight."""
    A, B = (
        _normal(s["n"], s[channels], s["p"], s["p"], dtype=dtype, device=device, seed=seed)
        for seed, channels in enumerate("io")
    )
    kernel = _normal(s["o"], s["i"], 3, 3, dtype=dtype, device=device, seed=3)
    return A, B, (torch.arange(s["n"], device=device) % 2).float(), kernel, [1, 1], [1, 1], [1, 1]


def convolved_alone(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """The same without weights."""
    A, B, _, kernel, *settings = convolved(s, dtype, device)
    return A, B, kernel, *settings


def paired_matrices(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """With a size m the meta examples are told apart."""
    A, _, B = matrices(s, dtype, device)
    meta = (s["m"], s["s"]) if "m" in s else (s["s"],)
    return (
        *(A, B, _normal(*meta, s["i"], dtype=dtype, device=device, seed=4)),
        _normal(*meta, s["o"], dtype=dtype, device=device, seed=5),
    )


def _lookups(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    indices = torch.randint(0, s["v"], (s["n"], s["t"]), device=device, generator=generator)
    return (
        *(indices, _normal(s["v"], s["o"], dtype=dtype, device=device, seed=1)),
        _normal(s["n"], s["t"], s["o"], dtype=dtype, device=device, seed=2),
    )


def _logits(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    targets = torch.randint(0, s["C"], (s["r"],), device=device, generator=generator)
    return 4 * _normal(s["r"], s["C"], dtype=dtype, device=device, seed=1), targets


def _logits_with_sums(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    logits, targets = _logits(s, dtype, device)
    _, highs, sums = ops.cross_entropy_rows(logits, targets, impl="reference")
    return logits, targets, highs, sums, _normal(s["r"], dtype=highs.dtype, device=device, seed=2)


def _two_rows(s: dict[str, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    shape = tuple(s.values())
    return _normal(*shape, dtype=dtype, device=device, seed=1), _normal(*shape, dtype=dtype, device=device, seed=2)


def _in_bfloat16(A: Tensor, V: Tensor, B: Tensor) -> Tensor:
    return compositions.direction(A.to(B.dtype), V.to(B.dtype), B)


def _full_product(A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    return B.flatten(0, 1).t() @ A.flatten(0, 1)


def _kernel_gradient(A: Tensor, B: Tensor, w: Tensor, kernel: Tensor, *settings: list[int]) -> Tensor:
    scaled = B * w.to(B.dtype).view(-1, 1, 1, 1)
    return torch.ops.aten.convolution_backward(
        scaled, A, kernel, None, *settings, False, [0, 0], 1, [False, True, False]
    )[1]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _cross_entropy_backward(logits: Tensor, targets: Tensor, highs: Tensor, sums: Tensor, grad: Tensor) -> Tensor:
    """As torch does it; the logits stand for the log-probabilities that it kept, which are as large."""
    hits = torch.zeros_like(logits).scatter_(1, targets.unsqueeze(1), -grad.to(logits.dtype).unsqueeze(1))
    return torch.ops.aten._log_softmax_backward_data(hits, logits, 1, logits.dtype)


def _clip(dots: Tensor) -> Tensor:
    """A kernel less than in `operators`, whose rows stand beside the longer one."""
    clipped = dots.clamp_min(0)
    total = clipped.sum()
    return clipped / (total + (total == 0))


def _product_cases(small: bool) -> Iterator[OpCase]:
    """Widths of 768 only in bfloat16, for the sake of the time that all cases take."""
    bf16, single = torch.bfloat16, torch.float32
    plain = "matmul, multiply, sum"
    for width in (24,) if small else (768, 1024, 4096):
        sizes = dict(n=4, t=8, i=width, o=width) if small else dict(n=128, t=128, i=width, o=width)
        terms, rows = sizes["t"] * width * width, sizes["n"] * sizes["t"]
        for dtype in (bf16,) if width == 768 else (bf16, single):
            target = "matrix >= 0.75, speedup >= 1.25" if dtype is bf16 else ""
            yield OpCase("direction_dots", sizes, dtype, matrices, plain, compositions.direction, terms, target)
            if dtype is bf16 or width < 4096:
                target = "speedup >= 1.6" if dtype is bf16 else ""
                baseline = "matmul over all rows"
                yield OpCase("weighted_grad", sizes, dtype, with_half_kept, baseline, _full_product, rows, target)
        if width != 768:
            baseline = "to bfloat16, matmul, multiply, sum"
            yield OpCase("direction_dots", sizes, EIGHT_BITS, eight_bits, baseline, _in_bfloat16, terms)
            rounded = OpCase("direction_dots", sizes, EIGHT_BITS, sixteen_bits, plain, compositions.direction, terms)
            yield rounded._replace(prepare=_rounded)
    one = dict(n=32, t=1, i=24, o=24) if small else dict(n=16384, t=1, i=1024, o=1024)
    long = dict(n=2, t=64, i=24, o=24) if small else dict(n=4, t=4096, i=1024, o=1024)
    for sizes in (one, long):
        terms = sizes["t"] * sizes["i"] * sizes["o"]
        yield OpCase("direction_dots", sizes, bf16, matrices, plain, compositions.direction, terms)


def _pair_cases(small: bool) -> Iterator[OpCase]:
    baseline = "two matmuls, multiply, sum"
    pairs = dict(n=8, t=1, s=4, i=24, o=24) if small else dict(n=16384, t=1, s=64, i=4096, o=4096)
    for dtype in (torch.bfloat16, torch.float32):
        terms = pairs["s"] * pairs["i"]
        yield OpCase("pair_dots", pairs, dtype, paired_matrices, baseline, compositions.pairs, terms)
    several = dict(n=8, t=3, m=4, s=5, i=24, o=24) if small else dict(n=256, t=64, m=64, s=64, i=1024, o=1024)
    lone = dict(n=8, t=1, m=4, s=1, i=24, o=24) if small else dict(n=16384, t=1, m=256, s=1, i=1024, o=1024)
    for sizes in (several, lone):
        terms = sizes["t"] * sizes["s"] * sizes["i"]
        yield OpCase(
            "pair_dots",
            sizes,
            torch.bfloat16,
            paired_matrices,
            f"{baseline} by pair",
            compositions.pairs_of_each,
            terms,
        )


def op_cases(small: bool) -> Iterator[OpCase]:
    """Every figure that the operators have to show has its case here; the small ones are for a dry run."""
    yield from _product_cases(small)
    yield from _pair_cases(small)
    bf16, single = torch.bfloat16, torch.float32
    images = dict(n=4, i=3, o=5, p=6) if small else dict(n=256, i=128, o=128, p=32)
    terms = images["n"] * images["p"] ** 2
    yield OpCase("weighted_kernel_grad", images, bf16, convolved, "scale, its backward", _kernel_gradient, terms)
    yield OpCase(
        *("kernel_grads", images, bf16, convolved_alone, "vmap of the backward", compositions.kernel_gradients),
        images["p"] ** 2,
    )
    tokens = dict(n=4, t=8, v=11, o=24) if small else dict(n=128, t=512, v=250000, o=1024)
    norm = dict(n=4, t=8, i=24) if small else dict(n=128, t=512, i=1024)
    wide = dict(n=2, t=8, i=40) if small else dict(n=16, t=1024, i=4096)
    few = dict(r=40, C=10) if small else dict(r=65536, C=1000)
    many = dict(r=4, C=1100) if small else dict(r=8192, C=32000)
    rows = dict(n=4, k=100) if small else dict(n=16384, k=4096)
    for dtype in (bf16, single):
        terms, copy = tokens["t"] * tokens["o"], "copy >= 0.8"
        yield OpCase(
            "embedding_dots", tokens, dtype, _lookups, "embedding, multiply, sum", compositions.embedding, terms, copy
        )
        for sizes in (norm, wide):
            baseline = "layer_norm, multiply, two sums"
            yield OpCase(
                "affine_grads", sizes, dtype, _two_rows, baseline, compositions.affine, sizes["t"] * sizes["i"], copy
            )
        for sizes in (few, many):
            yield OpCase(
                *("cross_entropy_rows", sizes, dtype, _logits, "cross_entropy", _cross_entropy, sizes["C"], copy)
            )
            baseline = "zeros, scatter, backward of log_softmax"
            yield OpCase(
                *("cross_entropy_rows_backward", sizes, dtype, _logits_with_sums, baseline),
                *(_cross_entropy_backward, sizes["C"], copy),
            )
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
    """Sorted times of single calls, on a GPU each with a cache that holds none of its operands.

    What empties the cache reads, since lines that were written would be on their way to memory while the call runs; and
    it takes longer than the host needs to issue a call, so that the device never waits for the host.
    """
    for _ in range(3):
        call()
    if device == "cpu":
        return sorted(_elapsed(call) for _ in range(rounds))
    flush = torch.ones(2**28, device=device)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in marks:
        flush.sum()
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
    source = _normal(2**16 if device == "cpu" else 2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(microseconds(lambda: target.copy_(source), device)) / 1e3


@cache
def matrix_ceiling(dtype: torch.dtype, device: str) -> float:
    """10^12 operations a second of a large product of the library, as PyTorch is set."""
    width = 64 if device == "cpu" else 8192
    a, b = (_normal(width, width, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    if dtype is EIGHT_BITS:
        scale = torch.ones((), device=device)
        times = microseconds(lambda: torch._scaled_mm(a, b.t(), scale, scale, out_dtype=torch.bfloat16), device)
    else:
        times = microseconds(lambda: a @ b, device)
    return 2 * width**3 / statistics.median(times) / 1e6


def measure_op(case: OpCase, device: str) -> Iterator[OpRow]:
    """A row for every implementation: its figures, or why there are none."""
    operator = OPERATORS[case.operator]
    arguments = case.arguments(case.sizes, case.dtype, device)
    blank = row_of(case, "measured")
    prepared = case.prepare(*arguments)
    truth, scale = _truth(case, prepared)
    with torch.no_grad():
        base = statistics.median(microseconds(lambda: case.compose(*arguments), device))
        for impl, reason in operator.reasons(*prepared).items():
            row = replace(blank, impl=impl)
            if reason is not None:
                yield replace(row, status=f"not measured: {reason}")
                continue
            try:
                yield _measured(case, row, base, arguments, truth, scale)
            except Exception as error:  # a compiler's errors have no base class of their own
                yield replace(row, status=f"not measured: {described(error)}")
                if broken(device):  # whatever follows in this process would fail as well
                    raise


def compiled_composition(case: OpCase, device: str) -> OpRow:
    """The composition by torch.compile beside the composition as it is.

    Held against the composition in float64: twice what it loses uncompiled is allowed, and 8 eps of the largest.
    """
    torch._dynamo.reset()  # cases share their compositions, and dynamo compiles one of them eight times at most
    arguments = case.arguments(case.sizes, case.dtype, device)
    row = replace(row_of(case, "measured"), impl="composition compiled", target="")
    compiled = torch.compile(case.compose, dynamic=False)
    with torch.no_grad():
        truth, plain = (_parts(case.compose(*given)) for given in (_changed(arguments, Tensor.double), arguments))
        outputs = _parts(compiled(*arguments))
        used = max(
            verdict(row.impl, got, want, beside_plain(near, want, float(want.abs().max()))).share
            for got, want, near in zip(outputs, truth, plain, strict=True)
        )
        base = statistics.median(microseconds(lambda: case.compose(*arguments), device))
        return _timed(case, replace(row, budget_used=used), lambda: compiled(*arguments), base, arguments, outputs)


def row_of(case: OpCase, status: str) -> OpRow:
    """A row of the case without figures."""
    sizes = " ".join(f"{letter}={size}" for letter, size in case.sizes.items())
    dtype = str(case.dtype).removeprefix("torch.") + (" from bfloat16" if case.prepare is _rounded else "")
    return OpRow(case.operator, sizes, dtype, "", status, target=case.target)


def described(error: Exception) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def broken(device: str) -> bool:
    """Whether the GPU takes no more work from this process, as after an access outside of its memory."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _measured(
    case: OpCase, row: OpRow, base: float, arguments: tuple[Any, ...], truth: tuple[Tensor, ...],
    scale: tuple[Tensor, ...],
) -> OpRow:  # fmt: skip
    public = getattr(ops, case.operator)

    def call() -> Any:
        return public(*case.prepare(*arguments), impl=row.impl)

    outputs = _parts(call())
    precise = torch.bfloat16 if case.dtype is EIGHT_BITS else case.dtype  # that of B
    used = max(
        verdict(row.impl, got, want, unit(precise, case.terms) * size).share
        for got, want, size in zip(outputs, truth, scale, strict=True)
    )
    row = replace(row, budget_used=used)
    return _timed(case, row, call, base, arguments, outputs)


def _timed(
    case: OpCase, row: OpRow, call: Callable[[], Any], base: float, arguments: tuple[Any, ...],
    outputs: tuple[Tensor, ...],
) -> OpRow:  # fmt: skip
    if row.budget_used is None or not row.budget_used <= 1:
        return replace(row, status="not measured: over the error budget")
    times = microseconds(call, outputs[0].device.type)
    return _figures(case, row, times, base, arguments, outputs)


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
    exact = _changed(arguments, Tensor.double)
    operator = OPERATORS[case.operator]
    truth = _parts(operator(*exact, impl="reference"))
    if case.operator == "clip_normalise":
        return truth, truth
    if case.operator == "affine_grads":
        X, B = exact
        normalised = X.abs() / torch.sqrt(X.square().mean(2, keepdim=True) + 1e-5)
        return truth, ((B.abs() * (normalised + 1)).sum(1), B.abs().sum(1))
    if case.operator == "cross_entropy_rows":
        largest = exact[0].abs().amax(1) + 1
        return truth, (largest, largest, truth[2] * (1 + 2 * largest))
    if case.operator == "cross_entropy_rows_backward":
        return truth, (exact[4].abs().unsqueeze(1).expand_as(truth[0]),)
    return truth, _parts(operator(*_changed(exact, Tensor.abs), impl="reference"))


def _changed(arguments: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return tuple(change(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def _parts(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def line(row: OpRow) -> str:
    """A row as a person reads it."""
    head = f"{row.operator:15} {row.sizes:32} {row.dtype:9} {row.impl:10}"
    if row.microseconds is None or row.speedup is None or row.share_of_copy is None or row.share_of_matrix is None:
        return f"{head} {row.status}"
    return (
        f"{head} {row.microseconds:9.1f} us, {row.speedup:5.2f} x {row.baseline}; copy {row.share_of_copy:.2f}, "
        f"matrix {row.share_of_matrix:.2f}" + (f" (to reach: {row.target})" if row.target else "")
    )
