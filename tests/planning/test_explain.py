"""`metakern.explain`: the same choices as the engine makes, and a model left alone."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import metakern
from metakern import dots as stage_dots
from metakern.dots import pairs
from metakern.engines import ghost
from metakern.testing import inputs
from metakern.testing.catalogue import CASES, Case
from metakern.testing.judge import Snapshot
from metakern.testing.models import Transformer, mlp

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def test_forms_are_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide layers beside few meta examples take pairs, narrow ones a direction; the engine is asked, not believed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 180), nn.ReLU(), nn.Linear(180, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    batches = inputs.pair(6, 3, 200, classes=3, dtype=torch.float32)
    monkeypatch.setattr(pairs, "TRACED_USE", -1)
    taken: list[int] = []
    original = stage_dots.pair_dots
    monkeypatch.setattr(ghost.stage_dots, "pair_dots", lambda record, *rest: taken.append(1) or original(record, *rest))
    metakern.grad_dots(model, *batches)
    made = len(taken)
    uses = metakern.explain(model, *batches).uses
    assert [use.form for use in uses].count("pairs") == made > 0
    assert [use.rule for use in uses] == ["linear", "linear", "norm", "linear"]
    assert uses[2].form == "direction"


def test_plan_is_another_name() -> None:
    assert metakern.plan is metakern.explain


def test_flops_bytes_and_shares() -> None:
    n, width = 32, 64
    model = mlp(width, 1, 10)
    batches = inputs.pair(n, 40, width, classes=10, dtype=torch.float32)
    found = metakern.explain(model, *batches)
    first = found.uses[0]
    assert first.parameters == "0.weight, 0.bias"
    assert first.dots_flops >= 2 * n * width * width
    assert first.gradient_flops >= 2 * n * width * width
    assert first.kept_bytes == 4 * n * width  # B; A is the batch
    assert found.uses[1].kept_bytes == 4 * n * (width + 10)
    assert sum(map(found.share, found.uses)) == pytest.approx(1.0)
    assert all(use.parameters in str(found) for use in found.uses)


@pytest.mark.parametrize("make", [lambda: mlp(64, 2, 10), lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))])
@pytest.mark.parametrize("kept", [4, 32])
def test_operations_of_a_step_are_those_foretold(make, kept: int) -> None:
    model = make()
    batch, meta_batch = inputs.pair(32, 3, 64, classes=10, dtype=torch.float32)
    found = metakern.explain(model, batch, meta_batch)
    weights = (torch.arange(32) < kept).float()
    with FlopCounterMode(display=False) as step:
        metakern.reweight_step(model, batch, meta_batch, rule=lambda dots: weights)
    with FlopCounterMode(display=False) as plain:
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    assert found.step_flops(kept / 32) == pytest.approx(step.get_total_flops(), rel=0.05)
    assert found.plain_flops == pytest.approx(plain.get_total_flops(), rel=0.05)


def test_operations_of_forward_mode_are_those_foretold() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
    batch, meta_batch = inputs.pair(32, 8, 64, classes=10, dtype=torch.float32)
    before = Snapshot.of(model)
    found = metakern.explain(model, batch, meta_batch)
    before.assert_unchanged(model)
    metakern.l2rw_step(model, batch, meta_batch)  # the first is held against autograd
    with FlopCounterMode(display=False) as step:
        assert metakern.l2rw_step(model, batch, meta_batch).engine == found.engine == "jvp"
    with FlopCounterMode(display=False) as plain:
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    assert found.step_flops() == pytest.approx(step.get_total_flops(), rel=0.05)
    assert found.plain_flops == pytest.approx(plain.get_total_flops(), rel=0.05)
    assert f"; {found.step_flops() / found.plain_flops:.2f} plain steps\npeak memory: " in str(found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layer_is_explained_and_left_alone(case: Case) -> None:
    setup = case.make(6, 3)
    before = Snapshot.of(setup.model)
    try:
        found = metakern.explain(setup.model, setup.batch, setup.meta_batch, loss_fn=setup.loss_fn)
    except NotImplementedError:
        assert case.auto != "exact"
    else:
        assert bool(found.uses) != bool(found.why_not_ghost)
        assert case.ghost != "exact" or found.engine == "ghost"
        assert str(found).endswith(f"engine: {found.engine}") or found.why_not_ghost in str(found)
    before.assert_unchanged(setup.model)


def test_restricted_parameters() -> None:
    torch.manual_seed(0)
    batches = [(inputs.labels(size, 5, classes=9), inputs.labels(size, classes=3)) for size in (4, 2)]
    model = Transformer(width=8, depth=1, heads=2, classes=3, vocabulary=9)
    found = metakern.explain(model, *batches, params="head")
    head = next(use for use in found.uses if use.parameters.startswith("head"))
    assert head.dots_flops > 0
    assert all(use.dots_flops == 0 for use in found.uses if not use.parameters.startswith("head"))


class Meter(nn.Module):
    """Counts its passes, in a number and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.passes, self.seen = nn.Linear(4, 3), 0, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.seen.append(len(x))
        return self.linear(x)


@pytest.mark.parametrize("coupled", [False, True])
def test_attributes_are_left_alone(coupled: bool) -> None:
    model = nn.Sequential(Meter(), *([nn.BatchNorm1d(3)] if coupled else []))
    metakern.explain(model, *inputs.pair(6, 3, 4, classes=3, dtype=torch.float32))
    assert (model[0].passes, model[0].seen) == (0, [])
