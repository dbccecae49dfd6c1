"""A weight that is used several times: each further use adds to the others inside its product, or in place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern import ops
from metakern.capture.record import Record
from metakern.capture.whole_modules import REGISTERED
from metakern.layers import embedding, generic, table
from metakern.layers.rule import Gradients, LayerRule, Weights
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step


class Recurrent(nn.Module):
    """Three steps of a recurrent network whose weight is that of the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = x.unbind(1)
        state = torch.tanh(self.into(first))
        for step in others:
            state = torch.tanh(self.into(step) + self.again(state))
        return nn.functional.linear(state, self.again.weight)


def test_further_uses_add_within_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[bool] = []
    operator = ops.weighted_grad

    def watched(*operands: Tensor, start: Tensor | None, **settings: bool) -> tuple[Tensor, Tensor]:
        starts.append(start is not None)
        return operator(*operands, start=start, **settings)

    monkeypatch.setattr(ops, "weighted_grad", watched)
    torch.manual_seed(0)
    model = Recurrent().double()
    setup = Setup(model, *inputs.pair(5, 3, 3, 4, classes=5))
    judge_step(metakern.l2rw_step, setup, engine="ghost")  # the first step asks twice, to be held against autograd
    starts.clear()
    metakern.l2rw_step(model, setup.batch, setup.meta_batch, engine="ghost")
    assert sorted(starts) == [False] * 2 + [True] * 4


def test_uses_of_two_dtypes_are_added_afterwards() -> None:
    """Under autocast one use is in bfloat16; the other, in float32, keeps its digits."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                low = self.layer(x)
            return self.layer(low.float())

    torch.manual_seed(0)
    model = Mixed()
    batch, meta_batch = inputs.pair(5, 3, 4, classes=4, dtype=torch.float32)
    result = metakern.l2rw_step(model, batch, meta_batch, engine="ghost")
    losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    wanted = torch.autograd.grad((result.weights * losses).sum(), list(model.parameters()))
    for p, want in zip(model.parameters(), wanted, strict=True):
        assert p.grad is not None
        budget.assert_within(p.grad, want, want.abs().max(), dtype=torch.bfloat16, terms=20)


VOCABULARY, WIDTH = 11, 4


class Tied(nn.Module):
    """A table that is looked up twice and is the head's weight; `last` uses it once more, before or after."""

    def __init__(self, last: nn.Module | None = None, padding: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.table.weight
        self.last = last

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.table(tokens) + self.table(tokens.flip(1)) * 2)
        return self.head(x).mean(1) if self.last is None else self.head(x).mean(1) + self.last(x)


def texts(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return inputs.labels(n, 3, classes=VOCABULARY, seed=seed), inputs.labels(n, classes=VOCABULARY, seed=seed + 1)


@pytest.fixture
def additions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each look-up whose rows are added to a gradient that is there."""
    met, add_rows = list[int](), embedding._add_rows

    def watched(*given: Tensor) -> None:
        met.append(1)
        add_rows(*given)

    monkeypatch.setattr(embedding, "_add_rows", watched)
    return met


@pytest.mark.parametrize("padding", [None, 0, -1])
def test_embeddings_add_their_rows_in_place(padding: int | None, additions: list[int]) -> None:
    """The same numbers every time; also where a virtual step asks several times."""
    found = []
    for _ in range(2):
        setup = Setup(Tied(padding=padding).double(), texts(6), texts(3, 5))
        judge_step(metakern.l2rw_step, setup, engine="ghost")
        found.append(setup.model.head.weight.grad)
    assert torch.equal(*found)
    assert len(additions) == 8  # two look-ups; each step was the first of its model, and held against autograd
    net = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
    metakern.mwnet_step(setup.model, net, setup.batch, setup.meta_batch, weight_optimizer=None, virtual_lr=0.1)
    assert len(additions) == 14


class Sum(nn.Module):
    """Adds two tables, whose gradients autograd hands out as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.randn(VOCABULARY, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean(1).unsqueeze(1) * 2 + (self.one + self.other)).tanh().sum(2)


class Handed(nn.Module):
    """Its rule hands out a tensor that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.kept = nn.Parameter(torch.randn(VOCABULARY, WIDTH)), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) @ self.table.t()


def handed(record: Record, weights: Weights) -> Gradients:
    found = generic.weighted_grads(record, weights)
    record.call.func.module.kept[:] = found.values()  # pyright: ignore
    return found


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(table._BY_MODULE)
    metakern.register_layer(Sum)
    metakern.register_layer(Handed, LayerRule(lambda call: True, generic.dots, handed))
    yield
    table._BY_MODULE.clear()
    table._BY_MODULE.update(before)
    REGISTERED.difference_update((Sum, Handed))


@pytest.mark.usefixtures("registered")
def test_one_tensor_for_two_parameters_is_not_written_into(additions: list[int]) -> None:
    last = Sum()
    model = Tied(last)
    model.head.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
    model.table.weight = last.one
    judge_step(metakern.l2rw_step, Setup(model.double(), texts(6), texts(3, 5)), engine="ghost")
    assert len(additions) == 4  # two look-ups, and once more to be held against autograd


@pytest.mark.usefixtures("registered")
def test_a_tensor_that_a_rule_keeps_is_not_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    last = Handed()
    model = Tied(last)
    model.head.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
    model.table.weight = last.table
    setup = Setup(model.double(), texts(6), texts(3, 5))
    judge_step(metakern.l2rw_step, setup, engine="ghost")
    (kept,) = last.kept
    weights = metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="ghost").weights
    x = torch.tanh(model.table(setup.batch[0]) + model.table(setup.batch[0].flip(1)) * 2).detach()
    losses = nn.functional.cross_entropy(model.head(x).mean(1).detach() + last(x), setup.batch[1], reduction="none")
    (want,) = torch.autograd.grad((weights * losses).sum(), [last.table])
    budget.assert_within(kept, want, 1 + want.abs())


def test_rows_of_another_dtype_are_not_rounded() -> None:
    """Under autocast the head's share of the table is in bfloat16, that of the look-up in float32."""

    class Mixed(Tied):
        def forward(self, tokens: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(tokens).float()

    model, batch, meta_batch = Mixed(), texts(6), texts(3, 5)
    result = metakern.l2rw_step(model, batch, meta_batch, engine="ghost")
    losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    (want,) = torch.autograd.grad((result.weights * losses).sum(), [model.table.weight])
    assert model.table.weight.grad is not None
    budget.assert_within(model.table.weight.grad, want, want.abs().max(), dtype=torch.bfloat16, terms=20)


@pytest.mark.gpu
def test_rows_are_added_in_one_order_on_a_gpu() -> None:
    found = []
    for _ in range(3):
        model = Tied().cuda()
        given = [tuple(t.cuda() for t in texts(n, 5)) for n in (1024, 3)]
        metakern.reweight_step(model, *given, rule=torch.ones_like, engine="ghost")
        found.append(model.table.weight.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
