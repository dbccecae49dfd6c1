"""Triton kernels under Triton's interpreter: their arithmetic, masks and strides, without a GPU."""

from __future__ import annotations

import pytest
import torch

from metakern.ops.select import OPERATORS
from metakern.testing.budget import assert_within
from tests.ops.cases import CASES
from tests.ops.test_operators import LAYOUTS, assert_exact, each, far_apart, same

pytestmark = [
    pytest.mark.interpreter,
    # the interpreter's own, for every loop whose bound is an argument
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

NAMES = [name for name, operator in OPERATORS.items() if operator.table[0].name == "triton"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_matches_reference_in_float64(name: str, layout: str, dtype: torch.dtype) -> None:
    for sizes in CASES[name].sizes:
        arguments = each(LAYOUTS[layout], CASES[name].arguments(sizes, dtype))
        assert_exact(name, sizes, arguments, "triton")


def test_weighted_grad_splits_rows_and_skips_those_of_weight_zero() -> None:
    A, B, w, _ = CASES["weighted_grad"].arguments((40, 13, 9, 7), torch.float32)
    assert_exact("weighted_grad", (40, 13, 9, 7), (A, B, w, True), "triton")
    A[w == 0], B[w == 0] = float("inf"), float("nan")
    assert all(part.isfinite().all() for part in OPERATORS["weighted_grad"](A, B, w, True, impl="triton"))
    assert same(OPERATORS["weighted_grad"](A, B, 0 * w, True, impl="triton"), (torch.zeros(7, 9), torch.zeros(7)))


@pytest.mark.parametrize("name", NAMES)
def test_offsets_beyond_32_bits(name: str) -> None:
    sizes = {"pair_dots": (2, 3, 5, 20, 7)}.get(name, (2, 3, 20, 7))
    first, *others = CASES[name].arguments(sizes, torch.float16)
    want = OPERATORS[name](first, *others, impl="triton")
    assert same(OPERATORS[name](far_apart(first), *others, impl="triton"), want)


def test_direction_dots_of_eight_bit_operands() -> None:
    A, V, B = CASES["direction_dots"].arguments((3, 5, 40, 33), torch.bfloat16)
    A, V = A.to(torch.float8_e4m3fn), V.to(torch.float8_e4m3fn)
    wide = A.double(), V.double(), B.double()
    got = OPERATORS["direction_dots"](A, V, B, impl="triton")
    want = OPERATORS["direction_dots"](*wide, impl="reference")
    assert_within(got, want, CASES["direction_dots"].scale(*wide), dtype=torch.bfloat16, terms=5 * 40 * 33)
