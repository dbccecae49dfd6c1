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
from triton.compiler import ASTSource  # noqa: E402

from metakern.ops.direction_dots import triton as direction  # noqa: E402
from metakern.ops.pair_dots import triton as pairs  # noqa: E402
from metakern.ops.tiles import Tile, table, tiles  # noqa: E402
from metakern.ops.weighted_grad import triton as weighted  # noqa: E402

pytestmark = pytest.mark.compiled

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_KIB = {80: 163, 90: 227, 100: 227}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
POINTERS = {
    "A": "x",
    "B": "x",
    "V": "x",
    "A_meta": "x",
    "B_meta": "x",
    "partial": "fp32",
    "kept": "i32",
}


KERNELS = {
    "direction_dots": direction.direction_dots_kernel,
    "pair_dots": pairs.pair_dots_kernel,
    "weighted_grad": weighted.weighted_grad_kernel,
}
ELEMENTS = {
    "bf16": (2, "ieee"),
    "fp16": (2, "ieee"),
    "fp32": (4, "tf32x3"),
    "tf32": (4, "tf32"),
    "fp8e4nv": (1, "ieee"),
}


def every_tile() -> list[Any]:
    """Every tile of the committed table, on the device that it was measured on, or on all."""
    return [
        pytest.param(KERNELS[operator], tile, element, precision, capability, id="-".join(name))
        for device, operators in table().items()
        for capability in (SHARED_KIB if device == "any" else [int(device.removeprefix("sm"))])
        for operator, sizes in operators.items()
        for element, (size, precision) in ELEMENTS.items()
        if str(size) in sizes and (element, capability) != ("fp8e4nv", 80)
        for shapes, tile in tiles(operator, size, device).items()
        if (name := (operator, shapes, element, str(capability), device))
    ]


def compiled(kernel: Any, tile: Tile, element: str, precision: str, capability: int, tmp_path: Path) -> dict[str, Any]:
    """Compile for one architecture; registers, stack, local memory accesses and shared memory of the machine code."""
    element = "fp32" if element == "tf32" else element
    constants = {"M": tile.m, "N": tile.n, "K": tile.k, "PRECISION": precision, "UPCAST": False}
    constants |= {"BIAS": True} if "BIAS" in kernel.arg_names else {}
    # the last stride of a contiguous operand is 1, which the launcher makes a constant
    last = (
        "stride_ai",
        "stride_vi",
        "stride_bo",
        "stride_ai_meta",
        "stride_bo_meta",
    )
    constants |= {name: 1 for name in kernel.arg_names if name in last}
    types = {**POINTERS, "kept_weights": "fp32", "count": "i32", "out": element, "shift": element}
    if element == "fp8e4nv":
        types["B"] = "bf16"
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "*" + types[name].replace("x", element) if name in types else "i32"
        if name not in ("t", "splits", "rows", "s"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", cubin], text=True, stderr=subprocess.STDOUT)
    code = subprocess.check_output([TOOLS / "cuobjdump", "-sass", cubin], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local accesses": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": binary.metadata.shared,
        "ptx": binary.asm["ptx"],
    }


@pytest.mark.parametrize(("kernel", "tile", "element", "precision", "capability"), every_tile())
def test_no_spills_and_tensor_cores(
    kernel: Any, tile: Tile, element: str, precision: str, capability: int, tmp_path: Path
) -> None:
    code = compiled(kernel, tile, element, precision, capability, tmp_path)
    print({name: value for name, value in code.items() if name != "ptx"})
    assert (code["stack"], code["local accesses"]) == (0, 0)
    assert code["shared"] <= SHARED_KIB[capability] * 1024
    assert MATRIX_INSTRUCTION[capability] in code["ptx"]
