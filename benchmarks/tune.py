"""`python -m benchmarks.tune`: measure the tiles of the Triton kernels on this GPU and write them into the table.

Every candidate runs at one size of each class of shapes ("small": few rows); the fastest takes the entry of this kind
of device in metakern/ops/tiles.json. `pytest -m compiled tests/ops` then checks the new entries like the old ones.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from itertools import product

import torch

from benchmarks.gpu_ops import matrices, microseconds, paired_matrices, with_half_kept
from metakern import ops
from metakern.ops import tiles
from metakern.ops.operands import EIGHT_BITS

LARGE, SMALL = dict(n=128, t=128, i=1024, o=1024, s=1024), dict(n=256, t=1, i=1024, o=1024, s=32)
SHAPES = {"large": LARGE, "small": SMALL}
DTYPES = {1: EIGHT_BITS, 2: torch.bfloat16, 4: torch.float32}
ARGUMENTS = {"direction_dots": matrices, "pair_dots": paired_matrices, "weighted_grad": with_half_kept}


def candidates(element_size: int) -> list[tiles.Tile]:
    """Blocks that tensor cores can fill; deeper ones for narrower elements."""
    depths = {1: (64, 128), 2: (32, 64), 4: (32,)}[element_size]
    sides = (32, 64, 128, 256) if element_size < 4 else (32, 64, 128)
    return [
        tiles.Tile(m, n, k, warps, stages)
        for m, n, k, warps, stages in product(sides[1:], sides, depths, (4, 8), (3, 4))
        if 64 * 32 <= m * n <= 128 * 256 and (warps == 8) == (m * n >= 128 * 128)
    ]


def fastest(
    operator: str, element_size: int, shapes: str, choices: list[tiles.Tile], device: str = "cuda"
) -> tuple[tiles.Tile, float]:
    """The best candidate and its median in microseconds; one that does not fit the chip is passed over."""
    like = ARGUMENTS[operator](SHAPES[shapes], DTYPES[max(2, element_size)], device)
    arguments = tuple(x.to(EIGHT_BITS) for x in like[:2]) + like[2:] if element_size == 1 else like
    public: Callable[..., object] = getattr(ops, operator)
    found: list[tuple[float, tiles.Tile]] = []
    for tile in choices:
        with tiles.instead(tile):
            try:
                times = microseconds(lambda: public(*arguments, impl="triton"), device, rounds=10)
            except Exception as error:  # Triton has no base class of its own for what the chip refuses
                print(f"{operator} {element_size} {shapes} {tile}: {type(error).__name__}", file=sys.stderr)
                continue
        found.append((statistics.median(times), tile))
    best, tile = min(found)
    return tile, best


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
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.tune measures on a GPU, and there is none here")
    table = {name: dict(operators) for name, operators in tiles.table().items()}
    kind = tiles.kind_of(torch.device("cuda"))
    entries: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    for operator, sizes in table["any"].items():
        entries[operator] = {}
        for size, classes in sizes.items():
            entries[operator][size] = {}
            for shapes in classes:
                tile, best = fastest(operator, int(size), shapes, candidates(int(size)))
                print(f"{kind} {operator} {size} {shapes}: {tile}, {best:.1f} us", flush=True)
                entries[operator][size][shapes] = {"tile": list(tile), "microseconds": round(best, 1)}
    tiles.PATH.write_text(written({**table, kind: entries}))


if __name__ == "__main__":
    main()
