"""The CUDA kernels, their bindings and the Python that calls them, run on the CPU: csrc/cuda compiled as C++ for an
emulated device, which looks at every access to memory and at every barrier (tests/ops/emulated)."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.ops import extension
from metakern.ops.operands import accumulator
from metakern.ops.select import OPERATORS
from metakern.testing.budget import assert_within
from metakern.testing.inputs import non_contiguous
from tests.ops.cases import CASES
from tests.ops.emulated.building import CSRC
from tests.ops.emulated.device import STREAM, Device, Emulated
from tests.ops.test_operators import DTYPES, LAYOUTS, doubled, each, far_apart, parts, rows_without_numbers, same

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH, which compiles the CUDA kernels")

NAMES = ["affine_grads", "clip_normalise", "cross_entropy_rows", "cross_entropy_rows_backward"]
NAMES += ["embedding_dots", "row_dots"]
KERNELS = {"cross_entropy_rows": "cross_entropy_kernel", "cross_entropy_rows_backward": "cross_entropy_backward_kernel"}
ADDED = ("affine_grads", "embedding_dots", "row_dots")
"""Operators whose kernels leave sums to `add_chunks_kernel`, of the dtype of sums."""

MORE = {
    "affine_grads": ((2, 70, 8), (3, 2, 1024)),
    "clip_normalise": ((2050,),),
    "cross_entropy_rows": ((33, 1024), (3, 1025)),
    "cross_entropy_rows_backward": ((9, 1024), (2, 8193), (2, 16400)),
    "row_dots": ((3, 16384), (2, 16392)),
}
"""Sizes beside those of all implementations: several chunks, one more than fits, and kernels of other widths."""

C_TYPES = dict(zip(DTYPES, ("double", "float", "__nv_bfloat16", "__half")))


def _strided(tensor: Tensor, strides: tuple[int, ...], start: int = 0) -> Tensor:
    """The same values in memory with gaps, whose values are none or no index."""
    room = start + 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides) if size > 0)
    gap = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    return torch.full((room,), gap, dtype=tensor.dtype).as_strided(tensor.shape, strides, start).copy_(tensor)


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor


def _padded(tensor: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 bytes."""
    return _strided(tensor, (*_steps(tensor, (tensor.shape[-1] + 8) // 8 * 8), 1))


def _skewed(tensor: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 bytes in the first example, and not in those after it."""
    steps = _steps(tensor, (tensor.shape[-1] + 8) // 8 * 8)
    return _strided(tensor, (*(step + 1 for step in steps[:1]), *steps[1:], 1))


def _offset(tensor: Tensor) -> Tensor:
    """One element after an aligned address."""
    return _strided(tensor, tensor.contiguous().stride(), 1)


def _expanded(tensor: Tensor) -> Tensor:
    """All examples in one place."""
    return tensor[:1].expand(tensor.shape)


def _steps(tensor: Tensor, row: int) -> list[int]:
    """Strides of all dimensions but the last, for rows so far apart."""
    return [row * math.prod(tensor.shape[k + 1 : -1]) for k in range(tensor.dim() - 1)]


ALL_LAYOUTS = {
    **{name: (change,) for name, change in LAYOUTS.items()},
    **{change.__name__: (change,) for change in (_padded, _skewed, _offset, _expanded)},
    **{f"{change.__name__} and _padded": (change, _padded) for change in (_contiguous, _skewed, _offset)},
    **{f"_padded and {change.__name__}": (_padded, change) for change in (_contiguous, _skewed, _offset)},
}
"""Layouts of the floating-point operands in turn; others have the first."""


def laid_out(layout: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    changes = ALL_LAYOUTS[layout]
    turns = itertools.cycle(changes)
    return each(lambda tensor: next(turns if tensor.is_floating_point() else iter(changes))(tensor), arguments)


@contextmanager
def emulating(device: Device) -> Iterator[None]:
    """Inside, operators run on the device: what they allocate is lent to it, and the current stream is its own."""
    guards: list[torch.device] = []

    @contextmanager
    def guard(where: torch.device) -> Iterator[None]:
        guards.append(where)
        yield
        guards.pop()

    def current_stream(where: torch.device) -> SimpleNamespace:
        assert guards == [where], "a kernel goes to the current device, wherever its tensors are"
        return SimpleNamespace(cuda_stream=STREAM)

    def lent(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_lent(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs).fill_(float("nan"))
            device.lend(tensor, "an output or a workspace", writable=True)
            return tensor

        return allocate_lent

    def lent_copy(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def copied(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            copy = method(tensor, *args, **kwargs)
            if copy.data_ptr() != tensor.data_ptr():
                device.lend(copy, "a copy of an operand")
            return copy

        return copied

    extension.unusable.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "missing", None)
        patch.setattr(extension, "cuda", device.native.cuda)
        patch.setattr(torch.cuda, "device", guard)
        patch.setattr(torch.cuda, "current_stream", current_stream)
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, lent(getattr(owner, name)))
        for name in ("contiguous", "to"):
            patch.setattr(Tensor, name, lent_copy(getattr(Tensor, name)))
        try:
            yield
        finally:
            device.take_back()
            extension.unusable.cache_clear()


def run(device: Device, name: str, arguments: tuple[Any, ...], **settings: Any) -> tuple[Tensor, ...]:
    """The outputs of the operator's native implementation for a GPU."""
    device.settings(**settings)
    given = each(lambda tensor: tensor.as_subclass(Emulated), arguments)
    with emulating(device):
        for k, argument in enumerate(given):
            if isinstance(argument, Tensor):
                device.lend(argument, f"operand {k}")
        return tuple(part.as_subclass(Tensor) for part in parts(OPERATORS[name](*given, impl="native")))


def supported(device: Device, name: str, arguments: tuple[Any, ...]) -> bool:
    with emulating(device):
        reason = OPERATORS[name].reasons(*each(lambda tensor: tensor.as_subclass(Emulated), arguments))["native"]
    assert reason in (None, "rows must be contiguous")
    return reason is None


def test_every_cuda_kernel_is_tested() -> None:
    assert {name.removesuffix("_backward") for name in NAMES} == {path.stem for path in CSRC.glob("cuda/*.cu")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matches_reference_in_float64(name: str, dtype: torch.dtype, device: Device) -> None:
    """In every layout and size, and the same to the last bit where blocks and threads run in the opposite order; no
    kernel of the operator is left out."""
    case = CASES[name]
    device.launched()
    for layout in ALL_LAYOUTS:
        for sizes in (*case.sizes, *MORE.get(name, ())):
            arguments = laid_out(layout, case.arguments(sizes, dtype))
            if not supported(device, name, arguments):
                continue
            got = run(device, name, arguments)
            want = parts(OPERATORS[name](*doubled(arguments), impl="reference"))
            scales = parts(case.scale(*doubled(arguments)))
            for value, truth, scale in zip(got, want, scales, strict=True):
                label = f"{name} {sizes} {layout}"
                assert_within(value, truth, scale, dtype=dtype, terms=case.terms(sizes), name=label)
            assert same(run(device, name, arguments, backwards=True), got)
    ran = set(device.launched())
    kernels = [f"{KERNELS.get(name, f'{name}_kernel')}<{C_TYPES[dtype]}"]
    if name in ADDED:
        kernels.append(f"add_chunks_kernel<{C_TYPES[accumulator(dtype)]}")
    compiled = {kernel for kernel in device.kernels.values() if any(some in kernel for some in kernels)}
    assert compiled
    assert not compiled - ran


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].far])
def test_offsets_beyond_32_bits(name: str, device: Device) -> None:
    sizes = CASES[name].sizes[-1]
    first, *others = CASES[name].arguments(sizes, torch.bfloat16)
    others = each(lambda a: a[:2] if len(a) == len(first) else a, tuple(others))
    near = _padded(first[:2])  # as those far apart, in wide pieces
    assert same(run(device, name, (far_apart(first[:2]), *others)), run(device, name, (near, *others)))


@pytest.mark.parametrize("name", ["cross_entropy_rows", "cross_entropy_rows_backward", "embedding_dots"])
def test_indices_and_numbers_of_rows_may_lie_anywhere(name: str, device: Device) -> None:
    """What a kernel takes side by side is copied before it is called."""
    arguments = CASES[name].arguments(CASES[name].sizes[-1], torch.float32)

    def scattered(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.dim() > 1:
            return tensor
        return non_contiguous(tensor.int() if name == "embedding_dots" else tensor)

    assert same(run(device, name, each(scattered, arguments)), run(device, name, arguments))


@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
def test_affine_grads_in_as_many_chunks_as_fit(multiprocessors: int, device: Device) -> None:
    for sizes in ((2, 257, 8), (40, 100, 5), (1, 1000, 3)):
        arguments = CASES["affine_grads"].arguments(sizes, torch.float64)
        want = OPERATORS["affine_grads"](*arguments, impl="reference")
        scales = CASES["affine_grads"].scale(*arguments)
        got = run(device, "affine_grads", arguments, multiprocessors=multiprocessors, resident=3)
        for value, truth, scale in zip(got, want, parts(scales), strict=True):
            assert_within(value, truth, scale, name=f"affine_grads {sizes}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 2100])
def test_cross_entropy_rows_of_numbers_that_are_none(classes: int, dtype: torch.dtype, device: Device) -> None:
    logits, targets = rows_without_numbers(classes, dtype)
    losses, highs, sums = run(device, "cross_entropy_rows", (logits, targets))
    got = run(device, "cross_entropy_rows_backward", (logits, targets, highs, sums, torch.ones_like(highs)))
    wide = logits.double()
    want = OPERATORS["cross_entropy_rows"](wide, targets, impl="reference")
    others = (*want[1:], torch.ones_like(want[0]))
    derivative = OPERATORS["cross_entropy_rows_backward"](wide, targets, *others, impl="reference")
    for found, truth in ((losses, want[0]), (*got, derivative)):
        assert torch.equal(found.isfinite(), truth.isfinite())
        assert torch.equal(found.isnan(), truth.isnan())
        assert_within(found.nan_to_num(posinf=0.0), truth.nan_to_num(posinf=0.0), 8.0, dtype=dtype, terms=classes)


def test_indices_and_targets_that_are_none_stop_the_kernel(device: Device) -> None:
    logits, ones = torch.ones(4, 3), torch.ones(4)
    for target in (-1, 3):
        with pytest.raises(RuntimeError, match=r"__trap\(\) was called"):
            run(device, "cross_entropy_rows", (logits, torch.tensor([0, target, -100, 2])))
    for index in (-1, 4):
        with pytest.raises(RuntimeError, match=r"__trap\(\) was called"):
            run(device, "embedding_dots", (torch.tensor([[0, 1], [2, index]]), logits, torch.ones(2, 2, 3)))
    assert run(device, "row_dots", (logits, logits))[0].tolist() == (3 * ones).tolist()  # a device that goes on


def test_a_gpu_that_nothing_was_compiled_for_has_other_implementations(device: Device) -> None:
    device.settings(has_image=False)
    dots = torch.tensor([-1.0, 3.0, 1.0]).as_subclass(Emulated)
    with emulating(device):
        reason = OPERATORS["clip_normalise"].reasons(dots)["native"]
        assert OPERATORS["clip_normalise"](dots).tolist() == [0, 0.75, 0.25]
    assert reason == (
        "metakern._C does not run on cpu: no kernel image is available for execution on the device "
        "(see METAKERN_CUDA_ARCHS)"
    )
    assert run(device, "clip_normalise", (dots.as_subclass(Tensor),))[0].tolist() == [0, 0.75, 0.25]


def test_more_blocks_than_a_grid_has_are_refused(device: Device) -> None:
    with pytest.raises(RuntimeError, match="CUDA: invalid configuration argument"):
        device.native.cuda.row_dots(2, 0, 0, 0, 0, 2**31, 0, 0, 0, STREAM)
    with pytest.raises(RuntimeError, match="CUDA: invalid argument"):
        device.native.cuda.row_dots(4, 0, 0, 0, 0, 1, 0, 0, 0, STREAM)
    assert device.native.cuda.runtime_version() == 13000
