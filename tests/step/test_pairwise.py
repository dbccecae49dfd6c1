"""Dots of every example with every meta example, against the float64 loop over both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern import dots as stage_dots
from metakern import ops
from metakern.layers import per_example
from metakern.testing import budget, inputs
from metakern.testing.catalogue import CASES, Case
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot
from metakern.testing.oracle import oracle

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]

# That every layer has a right direction form is the matter of tests/step/test_exact.py.
NAMES = (
    "linear linear-positions conv2d embedding embedding-bag-mean layer-norm tied-weights weight-norm attention "
    "batch-norm-eval prelu bare-vit lstm"
).split()
SOME = [case for case in CASES if case.name in NAMES and case.ghost == "exact"]


def of_one(batch: Any, j: int) -> Any:
    """Meta example j as a meta batch."""
    return type(batch)(part[j : j + 1] for part in batch)


def assert_pairwise(setup: Setup, m: int, used: str | None = None, **settings: Any) -> Tensor:
    """Every column against the oracle of its meta example; rows have the mean of the dots; nothing is changed."""
    before = Snapshot.of(setup.model)
    result = metakern.grad_dots(
        setup.model, setup.batch, setup.meta_batch, loss_fn=setup.loss_fn, pairwise=True, **settings
    )
    before.assert_unchanged(setup.model)
    plain = metakern.grad_dots(setup.model, setup.batch, setup.meta_batch, loss_fn=setup.loss_fn, **settings)
    assert result.engine == plain.engine
    assert used in (None, result.engine)
    budget.assert_dots(result.dots.mean(1), setup.oracle())
    budget.assert_within(result.losses, plain.losses, 1 + plain.losses.abs())
    budget.assert_within(result.meta_loss, plain.meta_loss, 1 + plain.meta_loss.abs(), terms=100)
    assert result.dots.shape[1] == m
    for j in range(m):
        truth = oracle(setup.model, setup.batch, of_one(setup.meta_batch, j), loss_fn=setup.loss_fn)
        budget.assert_dots(result.dots[:, j], truth)
    return result.dots


@pytest.mark.parametrize("pairs_win", [True, False], ids=["pairs", "direction"])
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_layers(case: Case, pairs_win: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_dots, "pairs_are_cheaper", lambda *_, directions=1: pairs_win and directions == 3)
    assert_pairwise(case.make(5, 3), 3, "ghost", engine="ghost")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6, bias=False)),
        *(nn.Flatten(), nn.Linear(18, 3)),
    ).double()


@pytest.mark.parametrize(
    "settings", [{"engine": "jvp"}, {"engine": "double_backward"}, {"memory": "two_pass"}, {}], ids=str
)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (5, 1), (4, 3)])
def test_engines(n: int, m: int, settings: dict[str, str]) -> None:
    assert_pairwise(
        Setup(network(), *inputs.pair(n, m, 3, 4, classes=3)), m, settings.get("engine", "ghost"), **settings
    )


def test_no_weight_is_left_for_a_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_dots, "pairs_are_cheaper", lambda *_, directions=1: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    assert_pairwise(Setup(model, *inputs.pair(5, 3, 4, classes=3)), 3, "ghost")


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_linear_layers_meet_all_meta_examples_in_one_call(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight takes its bias along, unless that is used elsewhere too; then the bias takes directions."""
    monkeypatch.setattr(stage_dots, "pairs_are_cheaper", lambda *_, directions=1: True)
    monkeypatch.setattr(per_example, "LARGEST_SHARE", 0)
    calls, passes = [], []
    operator, along = ops.pair_dots, stage_dots.direction_dots
    monkeypatch.setattr(ops, "pair_dots", lambda *operands: calls.append(operands[2].shape) or operator(*operands))
    monkeypatch.setattr(stage_dots, "direction_dots", lambda *each: passes.append(along(*each)) or passes[-1])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Flatten(), nn.Linear(18, 3)).double()
    setup = Setup(model, *inputs.pair(5, 2, 3, 4, classes=3))
    assert_pairwise(setup, 2, "ghost", memory=memory)
    calls.clear()  # the first step asks for more, to be held against autograd
    assert_pairwise(setup, 2, "ghost", memory=memory)
    by_meta_example = [(2, 3, 4), (2, 3, 6), (2, 1, 18)]
    assert sorted(shape for shape in calls if len(shape) == 3) == sorted(by_meta_example)
    model[2].bias = model[0].bias
    assert_pairwise(setup, 2, "ghost", memory=memory)
    model[0].bias.requires_grad_(False)
    metakern.grad_dots(model, setup.batch, setup.meta_batch, pairwise=True, memory=memory)
    passes.clear()
    found = metakern.grad_dots(model, setup.batch, setup.meta_batch, pairwise=True, memory=memory)
    assert all(term is None for term in passes)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    budget.assert_dots(found.dots.mean(1), setup.oracle(names=names))


def test_some_parameters() -> None:
    setup = Setup(network(), *inputs.pair(4, 3, 3, 4, classes=3))
    names = ["0.bias", "3.weight"]
    for engine in ("ghost", "jvp", "double_backward"):
        got = metakern.grad_dots(setup.model, setup.batch, setup.meta_batch, params=names, engine=engine, pairwise=True)
        for j in range(3):
            truth = oracle(setup.model, setup.batch, of_one(setup.meta_batch, j), names=names)
            budget.assert_dots(got.dots[:, j], truth)


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def test_examples_that_interact() -> None:
    """g'_j is the gradient of loss j within its batch, statistics included; auto takes forward mode."""
    model = normalised()
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    before = Snapshot.of(model)
    found = metakern.grad_dots(model, batch, meta_batch, pairwise=True)
    assert found.engine == "jvp"
    before.assert_unchanged(model)
    losses = [nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in (batch, meta_batch)]
    rows = [[torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in each] for each in losses]
    flat = [torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each]) for each in rows]
    budget.assert_within(found.dots, flat[0] @ flat[1].T, flat[0].norm(dim=1, keepdim=True) * flat[1].norm(dim=1))


def test_meta_examples_that_interact_alone() -> None:
    """Ghost serves the batch; the meta batch is differentiated loss by loss."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses * losses.mean() if len(losses) == 3 else losses

    model = network()
    batch, meta_batch = inputs.pair(5, 3, 3, 4, classes=3)
    found = metakern.grad_dots(model, batch, meta_batch, loss_fn=loss, pairwise=True)
    assert found.engine == "ghost"
    losses = [loss(model, part) for part in (batch, meta_batch)]
    rows = [[torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in each] for each in losses]
    flat = [torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each]) for each in rows]
    budget.assert_within(found.dots, flat[0] @ flat[1].T, flat[0].norm(dim=1, keepdim=True) * flat[1].norm(dim=1))


def test_masks_are_those_of_the_dots() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    for engine in ("ghost", "jvp", "double_backward"):
        torch.manual_seed(1)
        found = metakern.grad_dots(model, batch, meta_batch, engine=engine, pairwise=True)
        after = torch.get_rng_state()
        torch.manual_seed(1)
        want = metakern.grad_dots(model, batch, meta_batch, engine=engine)
        assert torch.equal(after, torch.get_rng_state())
        budget.assert_within(found.dots.mean(1), want.dots, 1 + want.dots.abs())


def test_what_is_refused() -> None:
    model = network()
    batch, meta_batch = inputs.pair(5, 3, 3, 4, classes=3)
    before = Snapshot.of(model)
    for settings, message in (
        ({"micro_batch": 2}, "pairwise and micro_batch cannot be combined"),
        ({"batchnorm": "frozen"}, "pairwise dots are exact: batchnorm must be 'exact', got 'frozen'"),
        ({"engine": "jvp", "dot_precision": "bf16"}, "dot_precision='bf16' is for engine='ghost'"),
        ({"engine": "other"}, "engine must be 'auto' or one of"),
    ):
        with pytest.raises(ValueError, match=message):
            metakern.grad_dots(model, batch, meta_batch, pairwise=True, **settings)
    with pytest.raises(ValueError, match=r"meta_batch: targets have shape \(2,\)"):
        metakern.grad_dots(model, batch, (meta_batch[0], meta_batch[1][:2]), pairwise=True)
    before.assert_unchanged(model)
