"""The GPU benchmarks of the operators, run dry: every operator has a case, and what can run here is measured."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu_ops, tune
from metakern.ops import tiles
from metakern.ops.select import OPERATORS


def test_every_operator_is_measured() -> None:
    cases = list(gpu_ops.op_cases(small=True))
    assert {case.operator for case in cases} == set(OPERATORS)
    for case in cases:
        rows = {row.impl: row for row in gpu_ops.measure_op(case, "cpu")}
        reasons = OPERATORS[case.operator].reasons(*case.arguments(case.sizes, case.dtype, "cpu"))
        assert {impl for impl, row in rows.items() if row.status == "measured"} == {
            impl for impl, reason in reasons.items() if reason is None
        }
        assert all(row.bytes and row.flops and row.share_of_copy for row in rows.values() if row.microseconds)


def test_full_sizes_are_those_that_have_a_figure_to_reach() -> None:
    reached = {(case.operator, case.sizes.get("i")) for case in gpu_ops.op_cases(small=False) if case.target}
    assert reached >= {("direction_dots", 768), ("direction_dots", 1024), ("direction_dots", 4096)}
    assert reached >= {("weighted_grad", 4096), ("embedding_dots", None), ("affine_grads", 4096)}


def test_tiles_are_written_as_they_are_committed() -> None:
    assert tune.written(json.loads(tiles.PATH.read_text())) == tiles.PATH.read_text()


@pytest.mark.parametrize("element_size", tune.DTYPES)
def test_a_candidate_takes_the_place_of_the_table(element_size: int) -> None:
    assert len(set(tune.candidates(element_size))) > 8
    tile = tune.candidates(element_size)[0]
    with tiles.instead(tile):
        assert tiles.tile_for("direction_dots", torch.ones(1), 5, 5) == tile
    assert tiles.tile_for("direction_dots", torch.ones(1), 5, 5) == tiles.tiles("direction_dots", 4, "any")["small"]
