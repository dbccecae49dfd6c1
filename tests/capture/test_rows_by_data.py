"""Which rows belong to whom may differ from batch to batch: what was proved on the first must not be taken for all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

Between = Callable[[Tensor, Any], Tensor]


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {"first": nn.Linear(4, 6), "second": nn.Linear(6, 6), "head": nn.Linear(6, 3)}
    return nn.ModuleDict(layers).double()


def losses_of(before: Between, after: Between) -> Callable[[nn.ModuleDict, tuple[Tensor, Any, Tensor]], Tensor]:
    def losses(layers: nn.ModuleDict, batch: tuple[Tensor, Any, Tensor]) -> Tensor:
        rows, how, labels = batch
        hidden = layers["second"](before(torch.tanh(layers["first"](rows)), how))
        return F.cross_entropy(layers["head"](after(torch.tanh(hidden), how)), labels, reduction="none")

    return losses


def batch_of(how: Any, rows: int, examples: int, seed: int) -> tuple[Tensor, Any, Tensor]:
    return inputs.normal(rows, 4, seed=seed), how, inputs.labels(examples, classes=3, seed=seed)


def same(hidden: Tensor, how: Any) -> Tensor:
    return hidden


def by_split(hidden: Tensor, lengths: list[int]) -> Tensor:
    return torch.stack([part.mean(0) for part in hidden.split(lengths)])


def by_slices(hidden: Tensor, lengths: list[int]) -> Tensor:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return torch.stack([hidden[end - length : end].sum(0) for end, length in zip(ends, lengths)])


def by_segments(hidden: Tensor, lengths: list[int]) -> Tensor:
    return torch.segment_reduce(hidden, "mean", lengths=torch.tensor(lengths))


def row_by_row(hidden: Tensor, order: list[int]) -> Tensor:
    return torch.stack([hidden[k] for k in order])


def from_a_list(hidden: Tensor, order: list[int]) -> Tensor:
    rows = list(hidden)
    return torch.stack([rows[k] for k in order])


def by_an_index(hidden: Tensor, order: list[int]) -> Tensor:
    return hidden[torch.tensor(order)]


def by_look_up(hidden: Tensor, order: list[int]) -> Tensor:
    return F.embedding(torch.tensor(order), hidden)


def by_a_sparse_matrix(hidden: Tensor, order: list[int]) -> Tensor:
    places = torch.stack([torch.arange(len(order)), torch.tensor(order)])
    matrix = torch.sparse_coo_tensor(places, torch.ones(len(order), dtype=hidden.dtype), check_invariants=True)
    return torch.sparse.mm(matrix, hidden)


def in_place(hidden: Tensor, order: list[int]) -> Tensor:
    moved = hidden * 1
    moved[torch.tensor(order)] = hidden.clone()
    return moved


RAGGED = ([2, 2, 2], [1, 2, 3])
ORDERS = ([0, 1, 2, 3, 4, 5], [3, 1, 0, 2, 5, 4])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11, once in a process
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize(
    ("between", "hows", "examples"),
    [
        *((between, RAGGED, 3) for between in (by_split, by_slices, by_segments)),
        *((b, ORDERS, 6) for b in (row_by_row, from_a_list, by_an_index, by_look_up, by_a_sparse_matrix, in_place)),
    ],
)
def test_what_is_not_said_by_the_operations(between: Between, hows: Any, examples: int, memory: str) -> None:
    """The same operations take other rows in the second batch; the first layers' rows are then no longer in order."""
    layers, losses = model(), losses_of(same, between)
    first, second = (batch_of(how, 6, examples, seed=k) for k, how in enumerate(hows))
    meta_batch = batch_of(hows[0], 6, examples, seed=2)
    setup = Setup(layers, first, meta_batch, losses, interacting=True)
    assert judge_step(metakern.l2rw_step, setup, memory=memory).result.engine == "ghost"
    layers.zero_grad()
    setup = Setup(layers, second, meta_batch, losses, interacting=True)
    with pytest.raises(NotImplementedError, match="rows of linear are picked or ordered by data"):
        judge_step(metakern.l2rw_step, setup, memory=memory, engine="ghost")
    if between is not by_segments:  # they have no second derivative
        judge_step(metakern.l2rw_step, setup, engine="double_backward")
    layers.zero_grad()
    setup = Setup(layers, first, meta_batch, losses, interacting=True)
    assert judge_step(metakern.l2rw_step, setup, memory=memory).result.engine == "ghost"


@pytest.mark.parametrize("share", [0.2, 1e-3, 1e-9])
def test_a_neighbour_with_a_small_share(share: float) -> None:
    """A row that mostly belongs to its example and a little to another one."""

    def mixed(hidden: Tensor, other: Tensor) -> Tensor:
        return hidden + share * hidden[other]

    layers, losses = model(), losses_of(mixed, same)
    meta_batch = batch_of(torch.arange(5), 5, 5, seed=2)
    for k, other in enumerate(([0, 1, 2, 3, 4], [0, 0, 1, 2, 3])):
        setup = Setup(layers, batch_of(torch.tensor(other), 5, 5, seed=k), meta_batch, losses, interacting=True)
        assert judge_step(metakern.l2rw_step, setup).result.engine == ("jvp" if k else "ghost")
        layers.zero_grad()


def test_many_examples() -> None:
    """More than one scale per example is needed to tell two of them apart."""
    layers, losses = model(), losses_of(same, by_an_index)
    order = list(range(1100))
    meta_batch = batch_of([0, 1], 2, 2, seed=2)
    metakern.grad_dots(layers, batch_of(order, 1100, 1100, seed=0), meta_batch, loss_fn=losses, engine="ghost")
    order[3], order[1059] = 1059, 3  # the same last digit to base 32, 3 and 33 * 32 + 3
    with pytest.raises(NotImplementedError, match="picked or ordered by data"):
        metakern.grad_dots(layers, batch_of(order, 1100, 1100, seed=1), meta_batch, loss_fn=losses, engine="ghost")


@pytest.mark.parametrize("select", ["where", "masked_fill", "fmax"])
def test_a_value_of_the_batch_that_is_not_taken_yet(select: str) -> None:
    """The mean over the batch fills what is missing, and nothing is missing in the first batch."""

    def filled(hidden: Tensor, missing: Tensor) -> Tensor:
        if select == "where":
            return torch.where(missing[:, None], hidden.mean(0), hidden)
        if select == "masked_fill":
            return hidden.masked_fill(missing[:, None], hidden.mean())
        return torch.fmax(hidden, hidden.mean(0) - (0.0 if bool(missing.any()) else 9.0))

    layers, losses = model(), losses_of(filled, same)
    for missing in ([0, 0, 0, 0], [0, 1, 0, 1]):
        batch, meta_batch = (batch_of(torch.tensor(missing).bool(), 4, 4, seed=k) for k in range(2))
        setup = Setup(layers, batch, meta_batch, losses, interacting=True)
        assert judge_step(metakern.l2rw_step, setup).result.engine == "jvp"
        layers.zero_grad()


@pytest.mark.parametrize("time_major", [False, True])
def test_a_layout_that_only_the_batch_knows(time_major: bool) -> None:
    """As many positions as examples, and the loss averages over whichever dimension holds the positions."""

    def losses(layers: nn.ModuleDict, batch: tuple[Tensor, bool, Tensor]) -> Tensor:
        tokens, positions_first, labels = batch
        hidden = torch.tanh(layers["second"](torch.tanh(layers["first"](tokens.flatten(0, 1)))))
        logits = layers["head"](hidden).view(*tokens.shape[:2], 3).mean(0 if positions_first else 1)
        return F.cross_entropy(logits, labels, reduction="none")

    layers = model()
    for positions_first in (time_major, not time_major):
        batch, meta_batch = (
            (inputs.normal(4, 4, 4, seed=k), positions_first, inputs.labels(4, classes=3, seed=k)) for k in range(2)
        )
        judge_step(metakern.l2rw_step, Setup(layers, batch, meta_batch, losses, interacting=True))
        layers.zero_grad()


def test_spans_that_stay_in_order_stay_with_ghost() -> None:
    """Other slices, but of every example's own rows: checked in that step, and served without forward mode."""

    def losses(layers: nn.ModuleDict, batch: tuple[Tensor, int, Tensor]) -> Tensor:
        tokens, length, labels = batch
        hidden = torch.tanh(layers["second"](torch.tanh(layers["first"](tokens)))[:, :length])
        return F.cross_entropy(layers["head"](hidden).mean(1), labels, reduction="none")

    layers = model()
    for length in (5, 3, 4):
        batch, meta_batch = (
            (inputs.normal(n, 5, 4, seed=n), length, inputs.labels(n, classes=3, seed=n)) for n in (4, 3)
        )
        setup = Setup(layers, batch, meta_batch, losses, interacting=True)
        assert judge_step(metakern.l2rw_step, setup).result.engine == "ghost"
        layers.zero_grad()


class Routed(nn.Module):
    """Rows go to one of three experts, those of this router to the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.head = nn.Linear(4, 3), nn.Linear(5, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 5) for _ in range(3))
        nn.init.constant_(self.router.weight, 0.1)
        self.router.bias.data = torch.tensor([1.0, 0.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.router(x).softmax(1).max(1)
        mixed = x.new_zeros(len(x), 5)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero().flatten()
            mixed = mixed.index_add(0, rows, shares[rows, None] * expert(x[rows]))
        return self.head(torch.tanh(mixed))


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_experts_without_rows(memory: str) -> None:
    """All go to the first."""
    setup = Setup(Routed().double(), *inputs.pair(7, 3, 4, classes=3))
    assert judge_step(metakern.l2rw_step, setup, memory=memory).result.engine == "ghost"
