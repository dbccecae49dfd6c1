"""Every operator and implementation on a GPU, against the float64 reference on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import metakern
from metakern.ops.select import OPERATORS
from metakern.ops.waiting import without_waiting
from metakern.testing.budget import unit, verdict
from tests.ops.cases import CASES
from tests.ops.test_operators import LAYOUTS, doubled, each, parts, same

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_cudnn")]

NAMES = sorted(OPERATORS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def moved(tensor: Tensor) -> Tensor:
    """The tensor on the GPU, where it lies in memory as it does here."""
    if tensor.numel() == 0:
        return tensor.cuda()
    before = tensor.storage_offset()
    size = before + 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    there = torch.empty_strided((size,), (1,), dtype=tensor.dtype, device="cuda")
    return there.as_strided(tensor.shape, tensor.stride(), before).copy_(tensor)


def on_gpu(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return each(moved, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_matches_reference_in_float64(name: str, layout: str, dtype: torch.dtype) -> None:
    case, operator = CASES[name], OPERATORS[name]
    for sizes in case.sizes:
        arguments = each(LAYOUTS[layout], case.arguments(sizes, dtype))
        want = parts(operator(*doubled(arguments), impl="reference"))
        scales = parts(case.scale(*doubled(arguments)))
        there = on_gpu(arguments)
        for impl, reason in operator.reasons(*there).items():
            if reason is None:
                for got, truth, scale in zip(parts(operator(*there, impl=impl)), want, scales, strict=True):
                    result = verdict(f"{name}[{impl}] {sizes}", got, truth, unit(dtype, case.terms(sizes)) * scale)
                    assert result.ok, str(result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["direction_dots", "weighted_grad"])
def test_sizes_that_fill_the_chip(name: str, dtype: torch.dtype) -> None:
    """These take the largest tiles, and blocks that the copy engine fetches."""
    case, operator, sizes = CASES[name], OPERATORS[name], (128, 128, 1024, 1024)
    there = on_gpu(case.arguments(sizes, dtype))
    wide = doubled(there)
    results = parts(operator(*there)), parts(operator(*wide, impl="reference")), parts(case.scale(*wide))
    for got, truth, scale in zip(*results, strict=True):
        result = verdict(f"{name} {sizes}", got, truth, unit(dtype, case.terms(sizes)) * scale)
        assert result.ok, str(result)


@pytest.mark.parametrize("name", NAMES)
def test_same_result_in_every_run(name: str) -> None:
    operator = OPERATORS[name]
    arguments = on_gpu(CASES[name].arguments(CASES[name].sizes[-1], torch.float32))
    for impl, reason in operator.reasons(*arguments).items():
        if reason is None and impl != "reference":
            first = operator(*arguments, impl=impl)
            assert all(same(operator(*arguments, impl=impl), first) for _ in range(5))


@pytest.mark.parametrize("name", [name for name in NAMES if OPERATORS[name].table[0].name != "reference"])
def test_captured_in_a_cuda_graph(name: str) -> None:
    operator = OPERATORS[name]
    arguments = on_gpu(CASES[name].arguments(CASES[name].sizes[-1], torch.float32))
    with without_waiting():
        want = operator(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = operator(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert same(got, want)


eight_bits = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no products of eight bits"
)


@eight_bits
@pytest.mark.parametrize("sizes", [(7, 1, 33, 17), (3, 130, 64, 272), (128, 64, 256, 128)], ids=str)
def test_eight_bit_operands(sizes: tuple[int, ...]) -> None:
    A, V, B = on_gpu(CASES["direction_dots"].arguments(sizes, torch.bfloat16))
    A, V = A.to(torch.float8_e4m3fn), V.to(torch.float8_e4m3fn)
    wide = A.double(), V.double(), B.double()
    scale = CASES["direction_dots"].scale(*wide) * unit(torch.bfloat16, CASES["direction_dots"].terms(sizes))
    got = OPERATORS["direction_dots"](A, V, B, impl="triton")
    result = verdict(f"direction_dots {sizes}", got, OPERATORS["direction_dots"](*wide, impl="reference"), scale)
    assert result.ok, str(result)


@eight_bits
def test_long_sums_of_eight_bit_operands() -> None:
    """Of terms of one sign, where a sum that keeps 14 bits loses a little with every term: 4 in 1000 of this one."""
    sizes = (16, 4, 4096, 64)
    A, V, B = (abs(a) for a in on_gpu(CASES["direction_dots"].arguments(sizes, torch.bfloat16)))
    A, V = A.to(torch.float8_e4m3fn), V.to(torch.float8_e4m3fn)
    want = OPERATORS["direction_dots"](A.double(), V.double(), B.double(), impl="reference")
    allowed = unit(torch.float16, CASES["direction_dots"].terms(sizes)) * want
    result = verdict(f"direction_dots {sizes}", OPERATORS["direction_dots"](A, V, B, impl="triton"), want, allowed)
    assert result.ok, str(result)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp8"])
def test_dot_precision_leaves_the_gradient_alone(precision: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).cuda()
    x, y = torch.randn(16, 64).cuda(), torch.arange(16).cuda() % 4
    allowed = torch.backends.cuda.matmul.fp32_precision
    result = metakern.l2rw_step(model, (x, y), (x[:3], y[:3]), engine="ghost", dot_precision=precision)
    assert torch.backends.cuda.matmul.fp32_precision == allowed
    losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    want = torch.autograd.grad((result.weights * losses).sum(), list(model.parameters()))
    for p, grad in zip(model.parameters(), want, strict=True):
        assert p.grad is not None
        assert verdict("gradient", p.grad, grad, unit(torch.float32, 1024) * grad.abs().max()).ok


def test_offsets_beyond_32_bits() -> None:
    """Examples that lie 2^31 elements apart."""
    A, V, B = on_gpu(CASES["direction_dots"].arguments((2, 3, 16, 8), torch.float16))
    near, apart = (torch.empty_strided(A.shape, (n, 16, 1), dtype=A.dtype, device="cuda") for n in (64, 2**31))
    # neither is fetched in blocks, so the same kernel takes both
    want, got = (OPERATORS["direction_dots"](a.copy_(A), V, B) for a in (near, apart))
    assert torch.equal(got, want)
    del near, apart
