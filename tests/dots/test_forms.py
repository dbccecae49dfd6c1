"""Direction form and pairs form are the same number; the choice between them is by cost alone."""

import pytest
import torch
from torch import nn

import metakern
from metakern.dots import pairs
from metakern.engines import ghost
from metakern.testing import budget, inputs
from metakern.testing.catalogue import CASES, Case
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(autouse=True)
def pairs_are_worth_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the models are."""
    monkeypatch.setattr(ghost.stage_dots, "worth_tracing", lambda *_: True)


FORMS = pytest.mark.parametrize("pairs_win", [True, False], ids=["pairs", "direction"])
EXACT = [case for case in CASES if case.ghost == "exact"]


@FORMS
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_forced_form(case: Case, pairs_win: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ghost.stage_dots, "pairs_are_cheaper", lambda *_: pairs_win)
    judge_step(metakern.l2rw_step, case.make(5, 7), engine="ghost")


@FORMS
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (7, 1), (4, 4)])
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_several_meta_rows(n: int, m: int, memory: str, pairs_win: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summing A' and B' before multiplying is right for one meta row with one position only."""
    monkeypatch.setattr(ghost.stage_dots, "pairs_are_cheaper", lambda *_: pairs_win)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Flatten(), nn.Linear(18, 3)).double()
    judge_step(metakern.l2rw_step, Setup(model, *inputs.pair(n, m, 3, 4, classes=3)), engine="ghost", memory=memory)


def test_the_cost_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide layers with few meta rows take pairs, narrow ones with many positions take the direction."""
    chosen = []

    def watched(use: object, meta_use: object) -> bool:
        chosen.append(pairs.pairs_are_cheaper(use, meta_use))  # pyright: ignore[reportArgumentType]
        return chosen[-1]

    monkeypatch.setattr(ghost.stage_dots, "pairs_are_cheaper", watched)
    wide = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 3)).double()
    judge_step(metakern.l2rw_step, Setup(wide, *inputs.pair(6, 2, 256, classes=3)), engine="ghost")
    assert chosen[0]
    chosen.clear()
    narrow = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(120, 3)).double()
    judge_step(metakern.l2rw_step, Setup(narrow, *inputs.pair(6, 9, 30, 4, classes=3)), engine="ghost")
    assert not chosen[0]


@pytest.mark.parametrize(("width", "traced"), [(16, False), (1024, True)])
def test_the_meta_batch_is_traced_only_where_that_pays(
    width: int, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    passes, trace = [], ghost.trace_batch
    monkeypatch.setattr(ghost, "trace_batch", lambda *given, **how: passes.append(given) or trace(*given, **how))
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 3)).double()
    judge_step(metakern.l2rw_step, Setup(model, *inputs.pair(24, 2, width, classes=3)), engine="ghost")
    assert bool(passes) == traced


def test_frozen_and_restricted_weights_in_pairs_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ghost.stage_dots, "pairs_are_cheaper", lambda *_: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model[2].requires_grad_(False)
    setup = Setup(model, *inputs.pair(5, 4, 4, classes=3))
    judge_step(metakern.l2rw_step, setup, engine="ghost")
    result = metakern.grad_dots(model, setup.batch, setup.meta_batch, params="4.weight", engine="ghost")
    budget.assert_dots(result.dots, setup.oracle(names=["4.weight"]))
