"""Triton kernels under Triton's interpreter: their arithmetic, masks and strides, without a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metakern.ops.select import OPERATORS
from metakern.testing.budget import assert_within
from tests.ops.cases import CASES
from tests.ops.test_operators import LAYOUTS, assert_exact, each, far_apart, same

pytest.importorskip("triton")

from metakern.ops import triton_blocks as blocks
from metakern.ops.direction_dots import triton as direction
from metakern.ops.pair_dots import triton as pairs
from metakern.ops.tiles import Tile
from metakern.ops.weighted_grad import triton as weighted

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


@pytest.mark.parametrize("splits", [1, 2, 5, 32])
def test_weighted_grad_splits_rows_and_skips_those_of_weight_zero(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted, "row_splits", lambda *_: splits)
    A, B, w, _ = CASES["weighted_grad"].arguments((40, 13, 9, 7), torch.float32)
    assert_exact("weighted_grad", (40, 13, 9, 7), (A, B, w, True), "triton")
    start = torch.arange(63.0).view(9, 7).t()
    assert_exact("weighted_grad", (40, 13, 9, 7), (A, B, w, True, start), "triton")
    A[w == 0], B[w == 0] = float("inf"), float("nan")
    assert all(part.isfinite().all() for part in OPERATORS["weighted_grad"](A, B, w, True, impl="triton"))
    assert same(OPERATORS["weighted_grad"](A, B, 0 * w, True, impl="triton"), (torch.zeros(7, 9), torch.zeros(7)))


ALIGNED = ((7, 1, 32, 16), (1, 5, 8, 8), (3, 130, 72, 16), (2, 40, 16, 72), (40, 45, 16, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", ALIGNED, ids=str)
def test_blocks_fetched_by_the_copy_engine(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    for name, module in (("direction_dots", direction), ("weighted_grad", weighted)):
        arguments = CASES[name].arguments(sizes, dtype)
        assert module.copied_in_bulk(*(a for a in arguments if isinstance(a, Tensor) and a.dim() > 1))
        assert_exact(name, sizes, arguments, "triton")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, whose product has the NaN
@pytest.mark.parametrize("rows_first", [True, False])
def test_an_infinite_operand_meets_no_column_past_the_last(rows_first: bool) -> None:
    """Infinity times the zero that the copy engine reads there would be NaN."""
    A, V, B = CASES["direction_dots"].arguments((2, 3, 48, 40), torch.float32)
    A[0, 1, 5], V[:, 5], B[0, 1] = float("inf"), 1.0, B[0, 1].abs()
    V = V if rows_first else V.t().contiguous().t()
    want = OPERATORS["direction_dots"](A, V, B, impl="reference")
    got = OPERATORS["direction_dots"](A, V, B, impl="triton")
    assert got[0] == want[0] == float("inf")
    assert got[1].isfinite()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_rows_are_scaled_in_order_and_rounded_once(layout: str) -> None:
    B = LAYOUTS[layout](CASES["weighted_grad"].arguments((9, 3, 1, 21), torch.float16)[1])
    w = torch.tensor([0.0, 0.3, -1.7, 0.0, 0.0, 2.5, 0.1, 0.0, -0.4])
    scaled, sums = _scaled(B, w, bias=True)
    products = B[w != 0].float() * w[w != 0].view(-1, 1, 1)
    assert torch.equal(scaled[:5, :, :21], products.half())
    assert not scaled[:5, :, 21:].any()
    assert scaled.shape[2] == 32
    assert scaled[5:].isnan().all()  # neither written nor, in the product, read
    want = products.double().sum((0, 1))
    assert_within(sums, want, products.abs().sum((0, 1)), dtype=torch.float16, terms=15)
    assert _scaled(B, w, bias=False)[1].numel() == 0


def test_every_block_of_rows_has_a_program_if_there_are_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    B, w = CASES["weighted_grad"].arguments((50, 13, 1, 21), torch.float32)[1:3]
    kept = w != 0
    scaled, _ = _scaled(B, w, bias=False)
    assert torch.equal(scaled[: kept.sum(), :, :21], B[kept] * w[kept].view(-1, 1, 1))
    assert scaled[kept.sum() :].isnan().all()
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(weighted, "scaled_rows_kernel", Recorded(grids))
    monkeypatch.setattr(weighted, "add_parts_kernel", Recorded([]))
    for rows in (50, 6000, 10**6):
        for bias in (False, True):
            weighted.scaled_rows(torch.empty(rows, 13, 300, device="meta"), *3 * (w,), bias)
    assert grids == [(3, 11), (3, 11), (3, 1024), (3, 32), (3, 1024), (3, 32)]


def test_rows_are_split_where_the_last_wave_would_be_nearly_empty() -> None:
    for tiles in (132, 264, 528):  # full as they are
        assert weighted.row_splits(tiles, 256, 132) == 1
    for tiles in (9, 60, 133, 140):
        splits = weighted.row_splits(tiles, 256, 132)
        waves = tiles * splits / 132
        assert 1 < splits <= 32
        assert waves / math.ceil(waves) > 0.75
    assert weighted.row_splits(1, 256, 132) == 32
    assert weighted.row_splits(1, 16, 132) == 1  # adding would take longer
    assert weighted.row_splits(1, 0, 132) == 1


def test_as_many_programs_run_at_once_as_registers_and_shared_memory_allow() -> None:
    row = torch.ones(1, dtype=torch.bfloat16)
    for tile, resident in (((128, 128, 64, 8, 3), 2), ((128, 128, 64, 8, 4), 1), ((128, 256, 64, 8, 2), 1)):
        assert weighted.side_by_side(Tile(*tile), row) == 132 * resident


def _scaled(B: Tensor, w: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    kept = w.nonzero().squeeze(1)
    padded = torch.cat([kept, torch.full((len(w) - len(kept),), -(2**30))]).int()
    return weighted.scaled_rows(B, padded, w[kept], torch.tensor(len(kept), dtype=torch.int32), bias)


def test_outputs_of_any_width_are_fetched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only A needs to lie as the copy engine wants it: the scaled rows always do."""
    monkeypatch.setattr(weighted, "weighted_grad_kernel", None)
    for sizes in ((2, 64, 16, 7), (3, 130, 40, 1), (1, 90, 8, 70)):
        assert_exact("weighted_grad", sizes, CASES["weighted_grad"].arguments(sizes, torch.float32), "triton")


def test_what_the_copy_engine_cannot_fetch_goes_through_pointers() -> None:
    x = torch.zeros(4, 6, 8)
    assert blocks.copied_in_bulk(x, x[:, 0], x[1:], x[..., :4], x[:1], x.select(1, 0))
    assert not blocks.copied_in_bulk(x[..., 1:5])  # starts 4 bytes off
    assert not blocks.copied_in_bulk(torch.zeros(4, 6, 7))  # rows of 28 bytes
    assert not blocks.copied_in_bulk(x.mT)
    assert not blocks.copied_in_bulk(x[0].expand(4, 6, 8))
    assert not blocks.copied_in_bulk(torch.zeros(48).as_strided((2, 3, 4), (20, 8, 1)))
    assert not blocks.copied_in_bulk(x, None)
    strides = [
        described.strides for described in (blocks.described(x[:1], 1, 2, 8), blocks.described(x[:, :1], 1, 2, 8))
    ]
    assert strides == [[8, 8, 1], [48, 48, 1]]


def test_rows_without_a_copy() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    for some in (x, x[:1], x[:, 1:2], x[..., :2]):
        rows = blocks.rows_of(some)
        assert rows is not None
        assert torch.equal(rows, some.flatten(0, 1))
        assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert blocks.rows_of(x[:, :2]) is None
    assert blocks.rows_of(x.transpose(0, 1)) is None


@pytest.mark.parametrize("name", NAMES)
def test_offsets_beyond_32_bits(name: str) -> None:
    sizes = {"pair_dots": (2, 3, 5, 20, 7)}.get(name, (2, 3, 20, 7))
    first, *others = CASES[name].arguments(sizes, torch.float16)
    want = OPERATORS[name](first, *others, impl="triton")
    assert same(OPERATORS[name](far_apart(first), *others, impl="triton"), want)


class Recorded:
    """A kernel that only notes its grids."""

    def __init__(self, grids: list[tuple[int, ...]]) -> None:
        self.grids = grids

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *_, **__: None


@pytest.mark.parametrize("meta", [(70000, 40), (1, 5_000_000)], ids=str)
def test_many_meta_examples_and_positions_fit_a_grid(meta: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first dimension of a grid may have more than 65535 programs. (Nothing is computed here.)"""
    grids: list[tuple[int, ...]] = []

    monkeypatch.setattr(pairs, "pair_dots_kernel", Recorded(grids))
    m, s = meta
    A, B, A_meta, B_meta = (torch.empty(*shape, 8, device="meta") for shape in ((2, 3), (2, 3), (m, s), (m, s)))
    assert pairs.pair_dots(A, B, A_meta, B_meta).shape == (2, m)
    assert len(grids) > 1
    assert max(size for grid in grids for size in grid[1:]) == 65535


def test_pair_dots_in_several_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MOST", 2)
    for sizes in ((2, 3, 5, 70, 4, 3), (2, 3, 150, 1, 4, 3), (2, 3, 150, 4, 3)):
        assert_exact("pair_dots", sizes, CASES["pair_dots"].arguments(sizes, torch.float32), "triton")


def test_direction_dots_of_eight_bit_operands() -> None:
    A, V, B = CASES["direction_dots"].arguments((3, 5, 40, 33), torch.bfloat16)
    A, V = A.to(torch.float8_e4m3fn), V.to(torch.float8_e4m3fn)
    wide = A.double(), V.double(), B.double()
    got = OPERATORS["direction_dots"](A, V, B, impl="triton")
    want = OPERATORS["direction_dots"](*wide, impl="reference")
    assert_within(got, want, CASES["direction_dots"].scale(*wide), dtype=torch.bfloat16, terms=5 * 40 * 33)
    with pytest.raises(RuntimeError, match="float64 needs float64"):
        OPERATORS["direction_dots"](A, V, B.double(), impl="triton")
