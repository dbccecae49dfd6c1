"""The same step whichever implementation of each operator serves it."""

import pytest
import torch
from torch import nn

import metakern
from metakern.ops.select import OPERATORS
from metakern.testing import budget, inputs
from metakern.testing.catalogue import CASES, Case
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import gradients, judge_step

NAMES = ("linear", "linear-positions", "conv2d", "conv2d-groups", "embedding", "layer-norm", "group-norm", "bare-vit")
SOME = [case for case in CASES if case.name in NAMES]

IMPLEMENTATIONS = sorted({entry.name for operator in OPERATORS.values() for entry in operator.table})


def only(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave every operator that implementation and, where it has or supports none, the reference."""
    for operator in OPERATORS.values():
        kept = [entry for entry in operator.table if entry.name == implementation]
        reference = [entry for entry in operator.table if entry.name == "reference"]
        monkeypatch.setattr(operator, "table", tuple(kept + reference))


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_layers(case: Case, implementation: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(implementation, monkeypatch)
    judge_step(metakern.l2rw_step, case.make(6, 3), engine="ghost", memory=memory)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_enough_to_be_tiled(implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes beyond one cache tile, none of them a power of two."""
    only(implementation, monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Unflatten(1, (3, 85)), nn.Linear(85, 131), nn.ReLU(), nn.LayerNorm(131), nn.Linear(131, 257)),
        *(nn.Tanh(), nn.Flatten(), nn.Linear(771, 3)),
    ).to(dtype)
    setup = Setup(model, *inputs.pair(33, 9, 255, classes=3, dtype=dtype))
    judge_step(metakern.l2rw_step, setup, plain=setup.oracle(dtype=dtype), engine="ghost")


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_autocast(memory: str) -> None:
    """Under bfloat16 autocast, within twice what the plain loop under autocast loses."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.Flatten()),
        *(nn.Linear(72, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)),
    )
    setup = Setup(model, *inputs.pair(9, 5, 2, 5, 5, classes=3, dtype=torch.float32))
    truth = setup.oracle()
    with torch.autocast("cpu", torch.bfloat16):
        plain = setup.oracle(dtype=torch.float32)
        result = metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="ghost", memory=memory)
        # Inside, since the plain loop runs again for its gradient; autocast leaves the float64 truth alone.
        budget.assert_dots(result.dots, truth, plain=plain)
        budget.assert_gradient(gradients(setup.model), truth, weights=result.weights, plain=plain)
    assert result.dots.dtype == result.weights.dtype == torch.float32
