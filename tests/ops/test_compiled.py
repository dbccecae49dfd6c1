"""Triton kernels compiled ahead of time, without a GPU: they use the tensor cores, spill nothing and fit the chip.

Register counts move with Triton's version, so these figures hold for the version that constraints.txt pins.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's process cannot compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from metakern.ops.direction_dots import triton as direction  # noqa: E402
from metakern.ops.pair_dots import triton as pairs  # noqa: E402
from metakern.ops.tiles import Tile, table, tiles  # noqa: E402
from metakern.ops.triton_blocks import CAPABILITIES  # noqa: E402
from metakern.ops.weighted_grad import triton as weighted  # noqa: E402

pytestmark = pytest.mark.compiled

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
MATRIX_INSTRUCTION = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # mma.sync of the others
KERNELS = {
    "direction_dots": (direction.direction_dots_kernel, direction.direction_dots_bulk_kernel),
    "pair_dots": (pairs.pair_dots_kernel,),
    "weighted_grad": (weighted.weighted_grad_kernel, weighted.weighted_grad_bulk_kernel),
}
ELEMENTS = {
    "bf16": (2, "ieee"),
    "fp16": (2, "ieee"),
    "fp32": (4, "tf32x3"),
    "tf32": (4, "tf32"),
    "fp8e4nv": (1, "ieee"),
}


IN_BULK = (direction.direction_dots_bulk_kernel, weighted.weighted_grad_bulk_kernel)


UNMEASURED = {"any": (80, 90, 100), "99 KiB": (86, 89, 120)}


FORMS: dict[Any, tuple[dict[str, int], ...]] = {
    pairs.pair_dots_kernel: ({}, {"S": 8}, {"S": 1}),
    weighted.weighted_grad_kernel: ({}, {"START": 1}),
    weighted.weighted_grad_bulk_kernel: ({}, {"START": 1}),
    direction.direction_dots_bulk_kernel: ({}, {"OUTPUTS_FIRST": 0}),
}
"""Constants beside the tile with which a kernel is another one: columns of one meta example, or of several; a gradient
to add to; V as [i, o], which eight-bit operands never are."""


def every_tile() -> list[Any]:
    """Every tile of the committed table in every kernel, on the device that it was measured on, or on all."""
    return [
        pytest.param(kernel, tile, element, precision, capability, form, id="-".join((*name, *map(str, form.values()))))
        for device, operators in table().items()
        for capability in UNMEASURED.get(device) or [int(device.removeprefix("sm"))]
        for operator, sizes in operators.items()
        for element, (size, precision) in ELEMENTS.items()
        if str(size) in sizes and (element != "fp8e4nv" or capability >= 89)
        for shapes, tile in tiles(operator, size, device).items()
        for kernel in KERNELS[operator]
        if kernel not in IN_BULK or capability // 10 in CAPABILITIES
        for form in (FORMS.get(kernel, ({},)) if capability in UNMEASURED["any"] else ({},))
        if not (element == "fp8e4nv" and form)
        if (name := (kernel.__name__.removesuffix("_kernel"), shapes, element, str(capability), device))
    ]


def argument_types(kernel: Any, tile: Tile, element: str, form: dict[str, int]) -> dict[str, str]:
    """The types of pointers and descriptors; what is left are 32-bit numbers."""
    after = "bf16" if element == "fp8e4nv" else element  # of the operand that is not multiplied by tensor cores
    types = {name: f"*{element}" for name in ("A", "V", "A_meta", "B_meta", "scaled", "start", "out")}
    types |= {"B": f"*{after}", "partial": "*fp32", "kept": "*i32", "kept_weights": "*fp32", "count": "*i32"}
    types |= {"sums": "*fp32", "parts": "*fp32"}
    if kernel is weighted.add_parts_kernel:
        del types["count"]  # a number there
    if kernel is direction.direction_dots_bulk_kernel:
        v = (tile.n, tile.k) if form.get("OUTPUTS_FIRST", 1) else (tile.k, tile.n)
        blocks = {"A": (element, tile.m, tile.k), "V": (element, *v), "B": (after, tile.m, tile.n)}
    elif kernel is weighted.weighted_grad_bulk_kernel:
        blocks = {"A": (element, 1, tile.k, tile.n), "scaled": (element, 1, tile.k, tile.m)}
    else:
        blocks = {}
    return types | {name: f"tensordesc<{dtype}{list(block)}>" for name, (dtype, *block) in blocks.items()}


def compiled(
    kernel: Any, tile: Tile, element: str, precision: str, capability: int, form: dict[str, int], tmp_path: Path
) -> dict[str, Any]:
    """Compile for one architecture: registers, stack, local memory accesses and shared memory of the machine code,
    and what the assembler warns of."""
    element = "fp32" if element == "tf32" else element
    constants = {"M": tile.m, "N": tile.n, "K": tile.k, "GROUP": tile.group, "PRECISION": precision, "UPCAST": False}
    constants |= {"OUTPUTS_FIRST": True, "S": tile.n, "START": 0} | form
    # the last stride of a contiguous operand is 1, which the launcher makes a constant
    constants |= dict.fromkeys(
        ("stride_ai", "stride_vi", "stride_bo", "stride_ai_meta", "stride_bo_meta", "stride_si"), 1
    )
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = argument_types(kernel, tile, element, form)
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if name not in ("t", "splits", "rows", "m", "s", "blocks") and "tensordesc" not in signature[name]:
            aligned[(position,)] = [["tt.divisibility", 16]]
    aligned = {place: value for place, value in aligned.items() if kernel.arg_names[place[0]] not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=tile.options)
    cubin, ptx = tmp_path / "kernel.cubin", tmp_path / "kernel.ptx"
    cubin.write_bytes(binary.asm["cubin"])
    ptx.write_text(binary.asm["ptx"])
    usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", cubin], text=True, stderr=subprocess.STDOUT)
    code = subprocess.check_output([TOOLS / "cuobjdump", "-sass", cubin], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    assembler = [get_ptxas(capability).path, "-v", f"-arch=sm_{capability}"]
    assembler[-1] += "a" if capability >= 90 else ""
    command = [*assembler, ptx, "-o", os.devnull]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local accesses": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": binary.metadata.shared,
        "ptx": binary.asm["ptx"],
        "warnings": subprocess.run(command, text=True, capture_output=True, check=True).stderr,
    }


@pytest.mark.parametrize(("kernel", "tile", "element", "precision", "capability", "form"), every_tile())
def test_no_spills_and_tensor_cores(
    kernel: Any, tile: Tile, element: str, precision: str, capability: int, form: dict[str, int], tmp_path: Path
) -> None:
    code = compiled(kernel, tile, element, precision, capability, form, tmp_path)
    print({name: value for name, value in code.items() if name != "ptx"})
    assert (code["stack"], code["local accesses"]) == (0, 0)
    assert code["shared"] <= SHARED_KIB[capability] * 1024
    assert MATRIX_INSTRUCTION.get(capability, "mma.sync") in code["ptx"]
    assert kernel not in IN_BULK or "cp.async.bulk.tensor" in code["ptx"]
    if element == "fp8e4nv" and capability == 90:  # sums of K products are added in float32
        assert len(re.findall(r"\badd(?:\.rn)?\.f32", code["ptx"])) >= tile.m * tile.n // (32 * tile.warps)
    # products that wait for one another leave the tensor cores idle
    assert "serialized" not in code["warnings"]
    if element in ("bf16", "fp16") and capability == 90:
        assert_operands_are_on_their_way(code["ptx"])


def assert_operands_are_on_their_way(ptx: str) -> None:
    """Both operands of every product lie in shared memory, and one product runs while the next one is prepared."""
    products = re.findall(r"wgmma\.mma_async[^;]*;", ptx)
    assert all(re.search(r"\}, *%rd\d+, *%rd\d+", product) for product in products)
    assert "wgmma.wait_group.sync.aligned 1;" in ptx


@pytest.mark.parametrize("sums", [0, 1])
@pytest.mark.parametrize("element", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_rows_are_scaled_without_spills(capability: int, element: str, sums: int, tmp_path: Path) -> None:
    form = {"ROWS": weighted.SCALED.m, "COLUMNS": weighted.SCALED.n, "SUMS": sums}
    code = compiled(weighted.scaled_rows_kernel, weighted.SCALED, element, "ieee", capability, form, tmp_path)
    assert (code["stack"], code["local accesses"]) == (0, 0)
    # whole pieces of 16 bytes
    assert re.search(r"ld\.global(?:\.\w+)*\.v4\.b32", code["ptx"])
    assert re.search(r"st\.global(?:\.\w+)*\.v4\.b32", code["ptx"])


@pytest.mark.parametrize("parts", [2, 32])
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_parts_are_added_without_spills(capability: int, parts: int, tmp_path: Path) -> None:
    form = {"PARTS": parts, "BLOCK": 4096 // parts}
    plain = Tile(0, 0, 0, 4, 1)
    code = compiled(weighted.add_parts_kernel, plain, "bf16", "ieee", capability, form, tmp_path)
    assert (code["stack"], code["local accesses"]) == (0, 0)
    assert len(re.findall(r"ld\.global(?:\.\w+)*\.v4\.b32", code["ptx"])) == 4096 // (4 * 32 * plain.warps)
