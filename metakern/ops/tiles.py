"""Which tiles a Triton kernel uses: read from a committed table, so that no user's first step measures anything.

`tiles.json` has one entry per device ("sm90"), operator, bytes of an element and class of shapes, with the median time
that earned it; `python -m benchmarks.tune` on a GPU measures the candidates and writes the device's entries. If that
time is null, nothing was measured: the tile was chosen from compiler output (registers, shared memory, tensor cores).
This holds for all entries under "any" and "99 KiB", which serve devices without entries ("99 KiB": those that give a
program no more shared memory), and for entries of devices not tuned yet, whose tiles would spill or not fit elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATH = Path(__file__).with_name("tiles.json")
FEW = 128
"""With fewer programs than this, large tiles leave multiprocessors idle, so small ones are better."""


class Tile(NamedTuple):
    """Sizes of the blocks of a product [M, K] x [K, N], how a program is run, and in bands of how many tiles.

    p programs that run side by side read `group` m rows and p / group n columns: fewest for a group of sqrt(p n / m).
    For i = 4096 in bfloat16 and 132 programs that is 26 MB with tiles of 128 x 128 in bands of 8; with 128 x 256, 43 MB
    in bands of 8 and 34 MB in bands of 16.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options; fused multiply-add is asked for, since Triton 3.10 no longer uses it by default."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def staged(self, element_size: int) -> int:
        """Bytes of shared memory that hold the blocks of all stages."""
        return (self.m + self.n) * self.k * element_size * self.stages

    def programs(self, rows: int, columns: int) -> int:
        return -(-rows // self.m) * -(-columns // self.n)


@cache
def table() -> dict[str, Any]:
    """The committed table: device -> operator -> bytes of an element -> class of shapes -> tile."""
    return json.loads(PATH.read_text())


@cache
def tiles(operator: str, element_size: int, device: str, unmeasured: str = "any") -> dict[str, Tile]:
    """Tile by class of shapes ("large", "small", "wide"): those of this kind of device, or those of `unmeasured`."""
    entries = {name: kinds.get(operator, {}).get(str(element_size)) for name, kinds in table().items()}
    found = entries.get(device) or entries[unmeasured]
    return {shapes: Tile(*entry["tile"]) for shapes, entry in found.items()}


_instead: list[Tile] = []


@contextmanager
def instead(tile: Tile) -> Iterator[None]:
    """Every kernel runs with this tile inside: how candidates are measured and tested."""
    _instead.append(tile)
    try:
        yield
    finally:
        _instead.pop()


def tile_for(operator: str, like: torch.Tensor, rows: int, columns: int) -> Tile:
    """The tile for an output of this size: large ones where they are many enough to fill the chip, and wide ones, where
    there are any, if the columns fill one as well."""
    if _instead:
        return _instead[-1]
    known = tiles(operator, like.element_size(), *kind_of(like.device))
    large, wide = known["large"], known.get("wide")
    if wide is not None and columns >= wide.n and wide.programs(rows, columns) >= FEW:
        return wide
    return known.get("small", large) if large.programs(rows, columns) < FEW else large


@cache
def kind_of(device: torch.device) -> tuple[str, str]:
    """The name of a kind of device, such as "sm90", and the entry that serves it as long as it has none. Without a
    compute capability, as under the interpreter, both are "any"."""
    if device.type != "cuda":
        return "any", "any"
    found = torch.cuda.get_device_properties(device)
    roomy = found.shared_memory_per_block_optin >= ROOMY
    return f"sm{found.major}{found.minor}", "any" if roomy else "99 KiB"


ROOMY = 160 * 1024
"""Bytes of shared memory that the tiles under "any" may take: chips for data centres have them, others have 99 KiB."""
