"""The GPU benchmarks of the operators, run dry: every operator has a case, and what can run here is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_ops, tune
from metakern.ops import tiles
from metakern.ops.select import OPERATORS, Implementation, always


def test_every_operator_is_measured() -> None:
    cases = list(gpu_ops.op_cases(small=True))
    assert {case.operator for case in cases} == set(OPERATORS)
    for case in cases:
        rows = {row.impl: row for row in gpu_ops.measure_op(case, "cpu")}
        arguments = case.prepare(*case.arguments(case.sizes, case.dtype, "cpu"))
        reasons = OPERATORS[case.operator].reasons(*arguments)
        assert {impl for impl, row in rows.items() if row.status == "measured"} == {
            impl for impl, reason in reasons.items() if reason is None
        }
        assert all(row.bytes and row.flops and row.share_of_copy for row in rows.values() if row.microseconds)


def test_a_kernel_that_fails_is_named_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise ArithmeticError("out of resources\nshared memory")

    operator = OPERATORS["row_dots"]
    table = (Implementation("triton", broken, always), *operator.table[1:])
    monkeypatch.setattr(operator, "table", table)
    case = next(case for case in gpu_ops.op_cases(small=True) if case.operator == "row_dots")
    rows = {row.impl: row.status for row in gpu_ops.measure_op(case, "cpu")}
    assert rows == {"triton": "not measured: ArithmeticError: out of resources", "reference": "measured"}


def test_rows_are_kept_as_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []

    def failing(case: gpu_ops.OpCase, device: str, seconds: float) -> Iterator[gpu_ops.OpRow]:
        yield gpu_ops.row_of(case, f"measured {len(kept)}")
        raise KeyError("later")

    cases = list(gpu_ops.op_cases(small=True))[:2]
    monkeypatch.setattr(gpu, "work", lambda small, only: [("ops", case, failing) for case in cases])
    monkeypatch.setattr(gpu._Keep, "__call__", lambda self, row: kept.append(row.status))
    monkeypatch.setattr("sys.argv", ["gpu"])
    gpu.main()
    failed = "not measured: KeyError: 'later'"
    assert kept == ["measured 0", failed, "measured 2", failed]


def test_what_breaks_the_process_is_left_to_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(program: str, command: list[str]) -> None:
        raise SystemExit(" ".join(command[1:3] + command[5:]))

    cases = list(gpu_ops.op_cases(small=True))[:3]
    monkeypatch.setattr(gpu, "work", lambda small, only: [("ops", case, lambda *_: iter(())) for case in cases])
    monkeypatch.setattr(gpu, "broken", lambda device: True)
    monkeypatch.setattr("os.execv", stop)
    monkeypatch.setattr("sys.argv", ["gpu", "--start", "1"])
    with pytest.raises(SystemExit, match=r"-m benchmarks.gpu --only  --start 2"):
        gpu.main()


def test_full_sizes_are_those_that_have_a_figure_to_reach() -> None:
    reached = {(case.operator, case.sizes.get("i")) for case in gpu_ops.op_cases(small=False) if case.target}
    assert reached >= {("direction_dots", 768), ("direction_dots", 1024), ("direction_dots", 4096)}
    assert reached >= {("weighted_grad", 4096), ("embedding_dots", None), ("affine_grads", 4096)}


def test_tiles_are_written_as_they_are_committed() -> None:
    assert tune.written(json.loads(tiles.PATH.read_text())) == tiles.PATH.read_text()


@pytest.mark.parametrize("element_size", tune.DTYPES)
def test_a_candidate_takes_the_place_of_the_table(element_size: int) -> None:
    assert len(set(tune.candidates("direction_dots", element_size, "large"))) > 8
    tile = tune.candidates("direction_dots", element_size, "large")[0]
    with tiles.instead(tile):
        assert tiles.tile_for("direction_dots", torch.ones(1), 5, 5) == tile
    assert tiles.tile_for("direction_dots", torch.ones(1), 5, 5) == tiles.tiles("direction_dots", 4, "any")["small"]


def test_tuning_writes_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    best = tiles.Tile(64, 64, 64, 4, 3)
    path = tmp_path / "tiles.json"
    path.write_text(tiles.PATH.read_text())
    monkeypatch.setattr(tiles, "PATH", path)
    monkeypatch.setattr(tune, "fastest", lambda operator, *_: (best, 1.25) if operator == "pair_dots" else None)
    before = json.loads(path.read_text())
    for kind in ("sm90", "sm100"):
        tune.measure(kind, "any", 0.0)
    tune.measure("sm89", "99 KiB", 0.0)
    table = json.loads(path.read_text())
    assert table["sm90"]["pair_dots"]["2"]["large"] == {"tile": list(best), "microseconds": 1.2}
    assert table["sm90"]["weighted_grad"]["2"] == before["sm90"]["weighted_grad"]["2"]
    assert table["sm90"]["weighted_grad"]["4"] == before["any"]["weighted_grad"]["4"]
    assert table["sm100"]["weighted_grad"] == before["any"]["weighted_grad"]
    assert table["sm89"]["weighted_grad"] == before["99 KiB"]["weighted_grad"]
    assert tune.written(table) == path.read_text()


def test_tuning_begins_with_what_has_a_figure_to_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, order = tmp_path / "tiles.json", []
    path.write_text(tiles.PATH.read_text())
    monkeypatch.setattr(tiles, "PATH", path)
    monkeypatch.setattr(tune, "fastest", lambda *given: order.append(given[:3]))
    tune.measure("sm90", "any", 0.0)
    assert {given[:2] for given in order[:4]} == {("direction_dots", 2), ("weighted_grad", 2)}
    assert {given[1] for given in order} == {1, 2, 4}
    order.clear()
    tune.measure("sm90", "any", 0.0, only="pair_dots")
    assert {given[0] for given in order} == {"pair_dots"}


def test_large_tiles_are_tuned_in_bands_of_either_height() -> None:
    for operator in ("direction_dots", "weighted_grad"):
        choices = set(tune.candidates(operator, 2, "large"))
        for stages in (3, 4):
            for group in (8, 16):
                assert tiles.Tile(128, 256, 64, 8, stages, group) in choices
    two_fit_a_multiprocessor = tiles.Tile(128, 128, 64, 8, 3)
    assert two_fit_a_multiprocessor in tune.candidates("weighted_grad", 2, "small")


def test_every_class_of_shapes_has_candidates_that_fit() -> None:
    for kinds in tiles.table().values():
        for operator, sizes in kinds.items():
            for size, classes in sizes.items():
                for shapes in classes:
                    choices = tune.candidates(operator, int(size), shapes)
                    assert 4 <= len(set(choices)) == len(choices) <= 26
                    assert all(choice.staged(int(size)) <= tune.ROOM for choice in choices)


def test_a_wide_tile_takes_columns_that_fill_it() -> None:
    known, row = tiles.tiles("pair_dots", 2, "any"), torch.ones(1, dtype=torch.bfloat16)
    assert (
        tiles.tile_for("pair_dots", row, 16384, 1024) == tiles.tile_for("pair_dots", row, 16384, 128) == known["wide"]
    )
    assert tiles.tile_for("pair_dots", row, 16384, 127) == known["large"]
    assert tiles.tile_for("pair_dots", row, 100, 128) == known["small"]


def test_a_tile_that_gives_another_result_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(n=2, t=2, i=4, o=4)
    monkeypatch.setitem(tune.SEARCHES["direction_dots"], "large", tune.Search((sizes, sizes | dict(n=3)), ()))
    wrong, right = tiles.Tile(1, 1, 1, 1, 1), tiles.Tile(2, 1, 1, 1, 1)

    def run(A: torch.Tensor, V: torch.Tensor, B: torch.Tensor, impl: str) -> torch.Tensor:
        result = OPERATORS["direction_dots"](A, V, B, impl="reference")
        return 2 * result if impl == "triton" and tiles._instead[-1] == wrong else result

    monkeypatch.setattr("metakern.ops.direction_dots", run)
    found = tune.fastest("direction_dots", 4, "large", [wrong, right], "cpu")
    assert found is not None
    assert found[0] == right
    assert tune.fastest("direction_dots", 4, "large", [right], "cpu", deadline=0.0) is None
