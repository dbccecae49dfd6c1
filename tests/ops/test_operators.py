"""Every operator and implementation on the CPU against the float64 reference, and as a citizen of torch.library."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from metakern import ops
from metakern.ops import layout as layouts
from metakern.ops import triton_backend
from metakern.ops.select import OPERATORS, Implementation, always
from metakern.testing.budget import assert_within
from metakern.testing.inputs import labels, non_contiguous, normal
from tests.ops.cases import CASES

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = sorted(OPERATORS)
EACH_SIZE = [
    pytest.param(name, sizes, id=f"{name}-{'x'.join(map(str, sizes))}") for name in NAMES for sizes in CASES[name].sizes
]
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "strided": non_contiguous,
    "reversed": lambda tensor: (
        tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))
    ),
    "columns": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
}


def each(change: Callable[[Tensor], Tensor], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with their tensors changed; numbers stay what they are."""
    return tuple(change(a) if isinstance(a, Tensor) else a for a in arguments)


def doubled(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """In float64 where they are floating point: indices stay what they are."""
    return each(lambda a: a.double() if a.is_floating_point() else a, arguments)


def assert_exact(name: str, sizes: tuple[int, ...], arguments: tuple[Any, ...], impl: str | None) -> None:
    """One call against the reference in float64, within the operator's budget."""
    case, operator = CASES[name], OPERATORS[name]
    got = parts(operator(*arguments, impl=impl))
    want = parts(operator(*doubled(arguments), impl="reference"))
    dtype, terms = operand_dtype(arguments), case.terms(sizes)
    for value, truth, scale in zip(got, want, parts(case.scale(*doubled(arguments))), strict=True):
        assert_within(value, truth, scale, dtype=dtype, terms=terms, name=f"{name}[{impl}]")


def parts(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of an operator that returns one or several."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def same(first: Tensor | tuple[Tensor, ...], second: Tensor | tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(parts(first), parts(second), strict=True))


def operand_dtype(arguments: tuple[Any, ...]) -> torch.dtype:
    return next(a.dtype for a in arguments if isinstance(a, Tensor) and a.is_floating_point())


def implementations(name: str, arguments: tuple[Any, ...]) -> list[str]:
    return [impl for impl, reason in OPERATORS[name].reasons(*arguments).items() if reason is None]


def test_every_operator_has_a_case() -> None:
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("metakern::")
    }
    assert registered == set(OPERATORS) == set(CASES) == set(ops.__all__)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "sizes"), EACH_SIZE)
def test_matches_reference_in_float64(name: str, sizes: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    arguments = each(LAYOUTS[layout], CASES[name].arguments(sizes, dtype))
    for impl in (None, *implementations(name, arguments)):
        assert_exact(name, sizes, arguments, impl)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck, of torch 2.14
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("name", "sizes"), EACH_SIZE)
def test_opcheck(name: str, sizes: tuple[int, ...], requires_grad: bool) -> None:
    arguments = CASES[name].arguments(sizes, torch.float32)
    if requires_grad:
        arguments = each(lambda a: a.requires_grad_() if a.is_floating_point() else a, arguments)
    torch.library.opcheck(OPERATORS[name].overload, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_fake_agrees_with_real(name: str) -> None:
    for sizes in CASES[name].sizes:
        for dtype in DTYPES:
            arguments = CASES[name].arguments(sizes, dtype)
            fakes = parts(OPERATORS[name](*each(lambda a: a.to("meta"), arguments)))
            for fake, real in zip(fakes, parts(OPERATORS[name](*arguments)), strict=True):
                assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("name", NAMES)
def test_refuses_inputs_that_require_grad(name: str) -> None:
    arguments = CASES[name].arguments(CASES[name].sizes[-1], torch.float32)
    next(a for a in arguments if a.is_floating_point()).requires_grad_()
    with pytest.raises(ValueError, match=r"no_grad"):
        OPERATORS[name](*arguments)
    with torch.no_grad():
        assert not any(result.requires_grad for result in parts(OPERATORS[name](*arguments)))


@pytest.mark.parametrize("name", NAMES)
def test_unknown_and_unavailable_implementations(name: str) -> None:
    arguments = CASES[name].arguments(CASES[name].sizes[-1], torch.float32)
    with pytest.raises(ValueError, match=r"impl=\.\.\.\) must be None or one of .*'reference'.*got 'cuda'"):
        OPERATORS[name](*arguments, impl="cuda")
    for impl, reason in OPERATORS[name].reasons(*arguments).items():
        if reason is not None:
            with pytest.raises(RuntimeError, match=f"cannot run here: {impl}: "):
                OPERATORS[name](*arguments, impl=impl)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_named(name: str) -> None:
    arguments = CASES[name].arguments(CASES[name].sizes[-1], torch.float32)
    with pytest.raises(ValueError, match=rf"{name}: \w+ must have shape"):
        OPERATORS[name](arguments[0].unsqueeze(0), *arguments[1:])
    with pytest.raises(TypeError, match=rf"{name}: \w+ must be .*; got torch.complex64"):
        OPERATORS[name](arguments[0].to(torch.complex64), *arguments[1:])


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_counted(name: str) -> None:
    arguments = CASES[name].arguments(CASES[name].sizes[-1], torch.float32)
    with FlopCounterMode(display=False) as counter:
        OPERATORS[name](*arguments)
    assert counter.get_total_flops() == OPERATORS[name].contract.flops(*arguments) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole(name: str) -> None:
    arguments = CASES[name].arguments(CASES[name].sizes[-1], torch.float32)
    tensors = tuple(a for a in arguments if isinstance(a, Tensor))
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")
    assert same(compiled(*tensors), getattr(ops, name)(*tensors))


@pytest.mark.parametrize("elements", [1, 40, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pair_dots_in_tiles(elements: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some examples, some meta examples, a single pair at a time."""
    monkeypatch.setattr(layouts, "TILE_ELEMENTS", elements)
    for sizes in ((7, 3, 5, 4, 6, 9), (3, 1, 8, 1, 5, 4), (7, 3, 20, 6, 9)):
        arguments = each(LAYOUTS[layout], CASES["pair_dots"].arguments(sizes, torch.float32))
        assert_exact("pair_dots", sizes, arguments, "native")


def test_pair_dots_names_what_does_not_fit() -> None:
    A, B, A_meta, B_meta = CASES["pair_dots"].arguments((2, 3, 4, 5, 6, 7), torch.float32)
    for wrong, message in (
        ((A_meta, B_meta[0]), r"B_meta must have shape \[m, s, o\]; got \[5, 7\]"),
        ((A_meta[0], B_meta), r"B_meta must have shape \[s, o\]; got \[4, 5, 7\]"),
        ((A_meta, B_meta[1:]), r"B_meta must have shape \[m, s, o\] with m = 4; got \[3, 5, 7\]"),
        ((A_meta[None], B_meta[None]), r"A_meta must have shape \[s, i\]; got \[1, 4, 5, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.pair_dots(A, B, *wrong)


def test_weighted_grad_skips_rows_of_weight_zero() -> None:
    A, B, w, _ = CASES["weighted_grad"].arguments((6, 2, 5, 4), torch.float32)
    A[w == 0] = float("inf")
    B[w == 0] = float("nan")
    for impl in implementations("weighted_grad", (A, B, w)):
        assert all(part.isfinite().all() for part in ops.weighted_grad(A, B, w, bias=True, impl=impl))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_grad_adds_to_what_is_there_and_leaves_it(dtype: torch.dtype) -> None:
    for sizes in ((1, 0, 4, 5), (5, 3, 20, 70), (3, 300, 260, 5)):
        A, B, w, bias = CASES["weighted_grad"].arguments(sizes, dtype)
        for change in LAYOUTS.values():
            start = change(normal(sizes[3], sizes[2], seed=4, dtype=dtype))
            before = start.clone()
            for impl in implementations("weighted_grad", (A, B, w)):
                assert_exact("weighted_grad", sizes, (A, B, w, bias, start), impl)
                G, _ = ops.weighted_grad(A, B, 0 * w, start=start, impl=impl)
                assert G.is_contiguous()
                G.fill_(0)
                assert torch.equal(start, before)
    with pytest.raises(ValueError, match=r"start must have shape \[o, i\] with o = 5; got \[1, 260\]"):
        ops.weighted_grad(A, B, w, start=start[:1])
    with pytest.raises(TypeError, match=r"start must be .* like A; got torch.int64"):
        ops.weighted_grad(A, B, w, start=start.long())


def test_weighted_kernel_grad_skips_rows_of_weight_zero() -> None:
    A, B, w, *others = CASES["weighted_kernel_grad"].arguments((40, 2, 3, 32, 32, 3, 1, 1, 1, 1), torch.float32)
    A[w == 0] = float("inf")
    B[w == 0] = float("nan")
    for impl in (None, "reference"):
        parts = OPERATORS["weighted_kernel_grad"](A, B, w, *others, impl=impl)
        assert all(part.isfinite().all() for part in parts)


def test_clip_normalise_edges() -> None:
    for impl in ("native", "reference"):
        if impl in implementations("clip_normalise", (torch.ones(1),)):
            assert ops.clip_normalise(torch.tensor([-1.0, 0.0, -2.0]), impl=impl).tolist() == [0, 0, 0]
            assert ops.clip_normalise(torch.tensor([-1.0, 3.0, 1.0]), impl=impl).tolist() == [0, 0.75, 0.25]
            assert ops.clip_normalise(torch.tensor([1.0, float("nan")]), impl=impl).isnan().all()


def test_supports_may_not_hide_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Tensor) -> str | None:
        raise ZeroDivisionError

    operator = OPERATORS["clip_normalise"]
    broken_table = (operator.table[0]._replace(supports=broken), *operator.table[1:])
    monkeypatch.setattr(operator, "table", broken_table)
    with pytest.raises(ZeroDivisionError):
        operator(torch.ones(3))


def far_apart(rows: Tensor) -> Tensor:
    """The same values with examples 2^31 + 64 elements apart, in memory that is reserved but never touched."""
    stride = 2**31 + 64
    storage = torch.UntypedStorage((stride * (rows.shape[0] - 1) + rows[0].numel()) * rows.element_size())
    view = torch.tensor([], dtype=rows.dtype).set_(storage, 0, rows.shape, (stride, *rows.stride()[1:]))
    return view.copy_(rows)


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].far])
def test_offsets_beyond_32_bits(name: str) -> None:
    sizes = CASES[name].sizes[-1]
    arguments = CASES[name].arguments(sizes, torch.bfloat16)
    first = far_apart(arguments[0][:2])
    examples = len(arguments[0])
    arguments = each(lambda a: a[:2] if len(a) == examples else a, arguments)
    for impl in implementations(name, arguments):
        want = OPERATORS[name](*arguments, impl=impl)
        assert same(OPERATORS[name](first, *arguments[1:], impl=impl), want)


@pytest.mark.parametrize("index", [-1, 4])
def test_embedding_dots_refuses_an_index_outside_the_table(index: int) -> None:
    indices, V, B, _ = CASES["embedding_dots"].arguments((2, 3, 4, 5), torch.float32)
    indices[1, 2] = index
    for impl in implementations("embedding_dots", (indices, V, B)):
        with pytest.raises(IndexError):
            ops.embedding_dots(indices, V, B, impl=impl)


def test_embedding_dots_counts_the_padding_row_from_the_end() -> None:
    indices, V, B, _ = CASES["embedding_dots"].arguments((2, 3, 4, 5), torch.float32)
    assert torch.equal(
        ops.embedding_dots(indices, V, B, padding_idx=-1), ops.embedding_dots(indices, V, B, padding_idx=3)
    )


def test_embedding_dots_refuses_a_padding_row_that_the_table_does_not_have() -> None:
    indices, V, B, _ = CASES["embedding_dots"].arguments((2, 3, 4, 5), torch.float32)
    for padding, rows in ((4, 4), (-5, 4), (0, 0)):
        with pytest.raises(ValueError, match=rf"padding_idx must be one of the {rows} rows of V; got {padding}"):
            ops.embedding_dots(indices, V[:rows], B, padding_idx=padding)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_direction_dots_of_eight_bit_records_are_summed_as_wide_as_the_gradients(impl: str | None) -> None:
    A, V, B = CASES["direction_dots"].arguments((3, 5, 40, 33), torch.float64)
    A, V = A.to(torch.float8_e4m3fn), V.to(torch.float8_e4m3fn)
    want = torch.einsum("nti,oi,nto->n", A.double(), V.double(), B)
    got = ops.direction_dots(A, V, B, impl=impl)
    assert got.dtype == ops.direction_dots(*each(lambda a: a.to("meta"), (A, V, B))).dtype == torch.float64
    assert_within(got, want, CASES["direction_dots"].scale(A.double(), V.double(), B), dtype=torch.float64, terms=6600)


LARGE = {
    "affine_grads": (3, 70, 300),
    "cross_entropy_rows": (31, 3000),
    "cross_entropy_rows_backward": (31, 3000),
    "embedding_dots": (3, 150, 11, 400),
    "row_dots": (3, 50001),
}
"""Sizes at which the CPU kernels use several threads."""


@pytest.mark.parametrize("name", LARGE)
def test_result_does_not_depend_on_the_number_of_threads(name: str) -> None:
    arguments = CASES[name].arguments(LARGE[name], torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(OPERATORS[name](*arguments))
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert_exact(name, LARGE[name], arguments, None)


def test_kernels_go_to_the_device_of_their_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    operator = OPERATORS["clip_normalise"]
    monkeypatch.setattr(operator, "table", (Implementation("current", lambda dots: entered[-1], always),))
    there = torch.device("cuda:1")
    dots = FakeTensor(FakeTensorMode(), torch.empty(3, device="meta"), there)
    assert operator.run(dots) == there
    operator.run(torch.ones(3))
    assert entered == [there]


def test_float32_products_ask_for_tf32_by_either_name() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for name, kind in (("ieee", "tf32x3"), ("tf32", "tf32")):
            matmul.fp32_precision = name
            assert triton_backend.precision(torch.float32) == kind
    finally:
        matmul.fp32_precision = before
    assert triton_backend.precision(torch.bfloat16) == "ieee"


def test_cross_entropy_rows_is_the_loss_that_torch_differentiates() -> None:
    logits, targets = 3 * normal(40, 70, dtype=torch.float32), labels(40, classes=70)
    targets[::7] = -100
    given = logits.double().requires_grad_()
    want = F.cross_entropy(given, targets, label_smoothing=0.2, reduction="none")
    grad = normal(40, seed=1, dtype=torch.float32)
    (derivative,) = torch.autograd.grad(want, given, grad.double())
    for impl in implementations("cross_entropy_rows", (logits, targets)):
        losses, highs, sums = ops.cross_entropy_rows(logits, targets, label_smoothing=0.2, impl=impl)
        assert_within(losses, want, logits.abs().max() + 1, terms=70)
        got = ops.cross_entropy_rows_backward(logits, targets, highs, sums, grad, label_smoothing=0.2, impl=impl)
        assert_within(got, derivative, grad.abs().max(), terms=70)


def test_cross_entropy_rows_keeps_the_digits_of_a_small_loss_beside_large_logits() -> None:
    logits = torch.tensor([[4096.0, 4080.0, 4076.0]])
    want = F.cross_entropy(logits.double(), torch.tensor([0]), reduction="none")
    for impl in implementations("cross_entropy_rows", (logits, torch.tensor([0]))):
        losses, *_ = ops.cross_entropy_rows(logits, torch.tensor([0]), impl=impl)
        assert_within(losses, want, 1.0)


def rows_without_numbers(classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits with infinities and NaN in all kinds of places, and targets."""
    logits = normal(6, classes, dtype=dtype)
    logits[0] = -torch.inf
    logits[1, 1] = torch.inf
    logits[2, 1] = torch.nan
    logits[3, :-1], logits[4, -1] = -torch.inf, -torch.inf
    logits[5, 0] = torch.nan
    targets = torch.tensor([1, 1, 0, classes - 1, classes - 1, -100])
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [3, 2100])
def test_cross_entropy_rows_of_numbers_that_are_none(classes: int, dtype: torch.dtype) -> None:
    logits, targets = rows_without_numbers(classes, dtype)
    given = logits.double().requires_grad_()
    want = F.cross_entropy(given, targets, reduction="none")
    (derivative,) = torch.autograd.grad(want.sum(), given)
    derivative[5] = 0  # torch's is NaN where an ignored row has one
    for impl in implementations("cross_entropy_rows", (logits, targets)):
        losses, highs, sums = ops.cross_entropy_rows(logits, targets, impl=impl)
        got = ops.cross_entropy_rows_backward(logits, targets, highs, sums, torch.ones(6), impl=impl)
        for found, truth in ((losses, want), (got, derivative)):
            assert torch.equal(found.isfinite(), truth.isfinite())
            assert torch.equal(found.isnan(), truth.isnan())
            assert_within(found.nan_to_num(posinf=0.0), truth.nan_to_num(posinf=0.0), 8.0, dtype=dtype, terms=classes)


@pytest.mark.parametrize("target", [-1, 3])
def test_cross_entropy_rows_refuses_a_target_that_is_no_class(target: int) -> None:
    logits, targets = torch.ones(4, 3), torch.tensor([0, target, -100, 2])
    for impl in implementations("cross_entropy_rows", (logits, targets)):
        with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
            ops.cross_entropy_rows(logits, targets, impl=impl)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        ops.cross_entropy_rows_backward(logits, targets, *(torch.ones(4) for _ in range(3)))


def test_cross_entropy_rows_names_what_does_not_fit() -> None:
    logits, targets = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
    ones = torch.ones(4)
    for wrong, error, message in (
        ((logits[:, :0], targets), ValueError, r"logits must have one class at least; got \[4, 0\]"),
        ((logits, targets.int()), TypeError, r"targets must be int64; got torch.int32"),
        ((logits, targets[:2]), ValueError, r"targets must have shape \[r\] = \[4\]; got \[2\]"),
        ((logits, targets, -100, 1.5), ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
    ):
        with pytest.raises(error, match=f"cross_entropy_rows: {message}"):
            OPERATORS["cross_entropy_rows"](*wrong)
        with pytest.raises(error, match=f"cross_entropy_rows_backward: {message}"):
            OPERATORS["cross_entropy_rows_backward"](*wrong[:2], ones, ones, ones, *wrong[2:])
    with pytest.raises(TypeError, match=r"grad must be torch.float32 for logits of torch.float32; got torch.float64"):
        ops.cross_entropy_rows_backward(logits, targets, ones, ones, ones.double())
    with pytest.raises(ValueError, match=r"sums must have shape \[r\] = \[4\]; got \[3\]"):
        ops.cross_entropy_rows_backward(logits, targets, ones, ones[:3], ones)
