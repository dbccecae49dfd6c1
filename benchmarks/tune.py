"""`python -m benchmarks.tune`: measure the tiles of the Triton kernels on this GPU and write them into the table.

Every candidate runs at a size or two of each class of shapes; the fastest, by the geometric mean, takes the entry of
this kind of device in metakern/ops/tiles.json. `pytest -m compiled tests/ops` then checks the new entries like the old
ones.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_ops import matrices, microseconds, paired_matrices, with_half_kept
from metakern import ops
from metakern.ops import tiles
from metakern.ops.operands import EIGHT_BITS

DTYPES = {1: EIGHT_BITS, 2: torch.bfloat16, 4: torch.float32}
ARGUMENTS = {"direction_dots": matrices, "pair_dots": paired_matrices, "weighted_grad": with_half_kept}


class Search(NamedTuple):
    """What the tiles of a class of shapes are measured at, and which of them."""

    sizes: tuple[dict[str, int], ...]
    blocks: tuple[tuple[int, int], ...]
    stages: tuple[int, ...] = (3, 4)
    groups: tuple[int, ...] = (8,)
    """Heights of a band of tiles of 128 x 128 and more."""


MANY, FEW = dict(n=128, t=128, i=1024, o=1024), dict(n=256, t=1, i=1024, o=1024)
WIDE = MANY | dict(i=4096, o=4096)
"""Where a band of tiles is more than runs side by side, so that its height matters."""
ALONE = dict(n=16384, t=1, i=1024, o=1024)
BLOCKS = ((64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128))
SMALL_BLOCKS = ((64, 32), (64, 64), (128, 32), (64, 128))
GROUPS = (8, 16)
STAGES = (3, 4, 6, 8)
"""Of a kernel that does nothing but multiply, whose stages are all that hides the way to memory."""
SEARCHES = {
    "direction_dots": {"large": Search((MANY, WIDE), BLOCKS, groups=GROUPS), "small": Search((FEW,), SMALL_BLOCKS)},
    "pair_dots": {
        "large": Search((MANY | dict(s=64),), BLOCKS),
        "small": Search((FEW | dict(s=32),), SMALL_BLOCKS),
        "wide": Search((MANY | dict(s=1024),), ((64, 128), (128, 128))),
    },
    # examples of many positions take one kernel, those of one another, and both the same tile
    "weighted_grad": {
        "large": Search((MANY | dict(i=2048, o=2048), WIDE), BLOCKS, STAGES, GROUPS),
        "small": Search((MANY, ALONE), ((64, 64), *BLOCKS[:3]), STAGES),
    },
}
"""Operator -> class of shapes -> what is measured."""
DEPTHS = {1: 128, 2: 64, 4: 32}
ROOM = 227 * 1024
"""Bytes of shared memory that a program may have on the chips with most of it."""
MINUTES = 7.0
WRONG = 0.05
"""Distance from the reference, as a share of its length, that no rounding explains."""


def candidates(operator: str, element_size: int, shapes: str) -> list[tiles.Tile]:
    """Blocks that tensor cores can fill, deeper ones for narrower elements: few enough to compile while one waits."""
    search, depth = SEARCHES[operator][shapes], DEPTHS[element_size]
    choices = (
        tiles.Tile(m, n, depth, 8 if m * n >= 128 * 128 else 4, stages, group)
        for m, n in search.blocks
        for stages in search.stages
        for group in (search.groups if m * n >= 128 * 128 else (8,))
    )
    return [tile for tile in choices if tile.staged(element_size) <= ROOM]


def fastest(
    operator: str,
    element_size: int,
    shapes: str,
    choices: list[tiles.Tile],
    device: str = "cuda",
    deadline: float = math.inf,
) -> tuple[tiles.Tile, float] | None:
    """The best candidate and its microseconds: a median, and of several sizes the geometric mean. One that is wrong or
    does not fit the chip is passed over; None if there is no other, or no time.
    """
    public: Callable[..., object] = getattr(ops, operator)
    given = [_arguments(operator, element_size, sizes, device) for sizes in SEARCHES[operator][shapes].sizes]
    wanted = [_first(public(*arguments, impl="reference")) for arguments in given]
    found: list[tuple[float, tiles.Tile]] = []
    for tile in choices:
        if time.perf_counter() > deadline:
            print(f"{operator} {element_size} {shapes} {tile}: out of time", file=sys.stderr)
            continue
        with tiles.instead(tile):
            try:
                times = [
                    _median(public, arguments, want, device) for arguments, want in zip(given, wanted, strict=True)
                ]
            except Exception as error:  # Triton has no base class of its own for what the chip refuses
                print(f"{operator} {element_size} {shapes} {tile}: {type(error).__name__}", file=sys.stderr)
                continue
        found.append((statistics.geometric_mean(times), tile))
    if not found:
        return None
    best, tile = min(found)
    return tile, best


def _arguments(operator: str, element_size: int, sizes: dict[str, int], device: str) -> tuple[torch.Tensor, ...]:
    like = ARGUMENTS[operator](sizes, DTYPES[max(2, element_size)], device)
    return tuple(x.to(EIGHT_BITS) for x in like[:2]) + like[2:] if element_size == 1 else like


def _median(
    public: Callable[..., object], arguments: tuple[torch.Tensor, ...], want: torch.Tensor, device: str
) -> float:
    got = _first(public(*arguments, impl="triton"))
    if not (got - want).norm() <= WRONG * want.norm():
        raise ArithmeticError("not the reference's result")
    return statistics.median(microseconds(lambda: public(*arguments, impl="triton"), device, rounds=10))


def _first(result: object) -> torch.Tensor:
    return (result[0] if isinstance(result, tuple) else result).double()  # pyright: ignore


def written(table: dict[str, dict[str, dict[str, dict[str, dict[str, object]]]]]) -> str:
    """The table as the file holds it: a line for every tile."""
    text = json.dumps(table, indent=2)
    for operators in table.values():
        for sizes in operators.values():
            for classes in sizes.values():
                for entry in classes.values():
                    text = text.replace(json.dumps(entry, indent=2).replace("\n", "\n" + 8 * " "), json.dumps(entry))
    return text + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", default="", choices=SEARCHES, help="measure the tiles of this operator")
    options = parser.parse_args()
    deadline = time.perf_counter() + 60 * options.minutes
    if not torch.cuda.is_available():
        sys.exit("benchmarks.tune measures on a GPU, and there is none here")
    measure(*tiles.kind_of(torch.device("cuda")), deadline, only=options.only)


def measure(kind: str, unmeasured: str, deadline: float, device: str = "cuda", only: str = "") -> None:
    """Fill the entry of this kind of device, written after every class, to the folder $OUT as well if that is set; what
    was not measured keeps its tile.
    """
    kept = [Path(os.environ["OUT"]) / tiles.PATH.name] if "OUT" in os.environ else []
    table = json.loads(tiles.PATH.read_text())
    entries, defaults = table.setdefault(kind, {}), table[unmeasured]
    wanted = [only] if only else list(defaults)
    for operator in wanted:
        known = entries.get(operator, {})
        entries[operator] = {size: classes | known.get(size, {}) for size, classes in defaults[operator].items()}
    order = [(name, size, shapes) for name in wanted for size, classes in entries[name].items() for shapes in classes]
    # what has a figure to reach comes first: products in half precision, of a direction and of weights
    for operator, size, shapes in sorted(order, key=lambda one: (one[1] != "2", one[0] == "pair_dots")):
        choices = candidates(operator, int(size), shapes)
        found = fastest(operator, int(size), shapes, choices, device, deadline)
        if found is not None:
            tile, best = found
            print(f"{kind} {operator} {size} {shapes}: {tile}, {best:.1f} us", flush=True)
            entries[operator][size][shapes] = {"tile": list(tile), "microseconds": round(best, 1)}
            for path in (tiles.PATH, *kept):
                path.write_text(written(table))


if __name__ == "__main__":
    main()
