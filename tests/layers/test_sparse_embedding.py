"""Embeddings whose gradient is sparse: no engine may mind."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.oracle import clip_normalise


class Tokens(nn.Module):
    def __init__(self, tied: bool, normalised: bool, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(7, 4, sparse=True, **settings), nn.Linear(4, 7)
        if tied:
            self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(4) if normalised else nn.Identity()
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.embedding(tokens).mean(1))))


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("tied", "settings"), [(False, {}), (True, {}), (False, {"max_norm": 0.5})])
def test_exact(tied: bool, settings: dict[str, Any], normalised: bool, memory: str) -> None:
    _assert_exact(Tokens(tied, normalised, **settings), memory)


class Bags(Tokens):
    def __init__(self, mode: str) -> None:
        super().__init__(tied=False, normalised=False)
        self.embedding = nn.EmbeddingBag(7, 4, sparse=True, mode=mode).double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags(mode: str, memory: str) -> None:
    _assert_exact(Bags(mode), memory)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    return ((inputs.labels(n, 3, classes=7, seed=n), inputs.labels(n, classes=7, seed=n + 1)) for n in (5, 3))


@pytest.mark.parametrize("virtual", ["sgd", "momentum"])
@pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
@pytest.mark.parametrize("bag", [False, True])
def test_steps_of_a_weight_net(bag: bool, engine: str, virtual: str) -> None:
    """A virtual step with a sparse gradient is that of the same table with a dense one."""
    steps = []
    for sparse in (True, False):
        model = Bags("mean") if bag else Tokens(tied=False, normalised=False)
        model.embedding.sparse = sparse
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        settings: dict[str, Any] = dict(weight_optimizer=torch.optim.SGD(net.parameters(), 0.1), virtual_lr=0.1)
        for _ in range(2):
            result = metakern.mwnet_step(
                model, net, *batches(), optimizer=optimizer, engine=engine, virtual=virtual, **settings
            )
        steps.append((result.dots, *model.parameters(), *net.parameters()))
    for got, want in zip(*steps, strict=True):
        budget.assert_within(got, want, 1 + want.abs())


def test_label_correction_beside_clean_examples_with_a_dense_gradient() -> None:
    """That of a penalty on the table, in the loss of clean examples and meta batch."""

    def penalised(model: Tokens, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses + model.embedding.weight.square().sum()

    found = []
    for sparse in (True, False):
        model = Tokens(tied=False, normalised=False)
        model.embedding.sparse = sparse
        net = nn.Sequential(nn.Embedding(7, 7), nn.Softmax(1)).double()
        nn.init.constant_(net[0].weight, 0.1)
        settings: dict[str, Any] = dict(label_optimizer=None, virtual_lr=0.1, loss_fn=penalised)
        metakern.mlc_step(model, net, *batches(), clean_batch=next(batches()), **settings)
        found.append([p.grad.to_dense() for p in (*model.parameters(), *net.parameters()) if p.grad is not None])
    for got, want in zip(*found, strict=True):
        budget.assert_within(got, want, 1 + want.abs())


@pytest.mark.parametrize("params", [None, "head"])
def test_metabalance(params: str | None) -> None:
    """Where the inner step leaves the table in its place, its outer gradient is sparse and its Hessian term dense."""
    found = []
    for sparse in (True, False):
        model = Bags("mean")
        model.embedding.sparse = sparse
        metakern.metabalance_step(model, *batches(), inner_lr=0.3, leak=0.2, params=params)
        found.append([p.grad.to_dense() for p in model.parameters() if p.grad is not None])
    for got, want in zip(*found, strict=True):
        budget.assert_within(got, want, 1 + want.abs())


@pytest.mark.parametrize("first", ["reuse", "two_pass"])
@pytest.mark.parametrize("second", ["reuse", "two_pass"])
def test_accumulates(first: str, second: str) -> None:
    model = Tokens(tied=False, normalised=False)
    metakern.l2rw_step(model, *batches(), memory=first)
    once = [p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None]
    metakern.l2rw_step(model, *batches(), memory=second, accumulate=True)
    for p, grad in zip(model.parameters(), once, strict=True):
        assert p.grad is not None
        budget.assert_within(p.grad.to_dense(), 2 * grad, 1 + grad.abs())


def layout_of(model: Tokens) -> torch.layout:
    grad = model.embedding.weight.grad
    assert grad is not None
    return grad.layout


STEPS: dict[str, dict[str, Any]] = {
    **{engine: {"engine": engine} for engine in ("ghost", "jvp", "double_backward")},
    "two passes": {"memory": "two_pass"},
    "parts": {"micro_batch": 2},
}


@pytest.mark.parametrize("keep", [slice(None), slice(1), slice(0)], ids=["all", "one", "none"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("kind", ["own", "tied", "sum", "max"])
def test_the_gradient_is_as_sparse_as_a_backward_pass_leaves_it(kind: str, name: str, keep: slice) -> None:
    """Of a tied table dense; of which examples carry weight nothing depends."""

    def rule(dots: Tensor) -> Tensor:
        return torch.zeros_like(dots).index_fill_(0, torch.arange(len(dots))[keep], 0.5)

    if name == "parts" and keep == slice(0):
        pytest.skip("no part is run")
    model, (batch, meta_batch) = Bags(kind) if kind in ("sum", "max") else Tokens(kind == "tied", False), batches()
    if kind == "max":
        model.embedding.sparse = False  # torch has none for it
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    want = layout_of(model)
    metakern.reweight_step(model, batch, meta_batch, rule=rule, **STEPS[name])
    assert layout_of(model) == want == (torch.sparse_coo if kind in ("own", "sum") else torch.strided)


@pytest.mark.parametrize("name", [name for name in STEPS if name != "parts"])
@pytest.mark.parametrize("kind", ["own", "sum"])
def test_sparse_adam_moves_as_after_a_backward_pass(kind: str, name: str) -> None:
    """Every row that was looked up, by examples of weight zero too."""
    found = []
    for plain in (False, True):
        model, (batch, meta_batch) = Bags(kind) if kind == "sum" else Tokens(tied=False, normalised=False), batches()
        optimizer = torch.optim.SparseAdam([model.embedding.weight], lr=0.1)
        for step in range(4):
            weights = torch.ones(5, dtype=torch.float64) if step == 0 else torch.eye(5, dtype=torch.float64)[step]
            if plain:
                model.zero_grad()
                (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * weights).sum().backward()
                optimizer.step()
            else:
                metakern.reweight_step(
                    model, batch, meta_batch, rule=lambda dots, w=weights: w, optimizer=optimizer, **STEPS[name]
                )
        found.append(model.embedding.weight.detach())
    budget.assert_within(found[0], found[1], 1 + found[1].abs(), terms=100)


def test_looked_up_before_and_after_the_table_is_a_head() -> None:
    """Dense and sparse gradients are added up in either order."""

    class Around(Tokens):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.head(torch.tanh(self.embedding(tokens).mean(1)))
            return x + self.embedding(tokens.flip(1)).sum((1, 2)).unsqueeze(1).sin() * torch.arange(7)

    _assert_exact(Around(tied=True, normalised=False), "reuse")


@pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
@pytest.mark.parametrize("bag", [False, True])
def test_pairwise_dots(bag: bool, engine: str) -> None:
    model = Bags("mean") if bag else Tokens(tied=False, normalised=False)
    found = []
    for sparse in (True, False):
        model.embedding.sparse = sparse
        found.append(metakern.grad_dots(model, *batches(), engine=engine, pairwise=True).dots)
    budget.assert_within(found[0], found[1], 1 + found[1].abs())


def test_check_and_steps_of_a_label_net() -> None:
    for model in (Tokens(False, False), Tokens(False, True), Bags("sum")):
        assert metakern.check(model, *batches()).ok
    model, net = Tokens(False, False), nn.Sequential(nn.Embedding(7, 7), nn.Softmax(1)).double()
    optimizer = torch.optim.SparseAdam([model.embedding.weight], lr=0.1)
    metakern.mlc_step(model, net, *batches(), label_optimizer=None, virtual_lr=0.1, optimizer=optimizer)
    assert layout_of(model) == torch.sparse_coo


def test_compiled_steps_refuse() -> None:
    model = Tokens(tied=False, normalised=False)
    for engine in ("ghost", "jvp"):
        with pytest.raises(NotImplementedError, match=r"a gradient is sparse .* without sparse=True"):
            metakern.compile_step(model, *batches(), engine=engine, backend="eager")
    assert metakern.compile_step(Tokens(True, False), *batches(), backend="eager")(*batches()).engine == "ghost"


def _assert_exact(model: nn.Module, memory: str) -> None:
    batch, meta_batch = batches()
    truth = Setup(model, batch, meta_batch, interacting=True).oracle()
    result = metakern.l2rw_step(model, batch, meta_batch, memory=memory)
    budget.assert_dots(result.dots, truth)
    budget.assert_within(result.weights, clip_normalise(result.dots), 1.0)
    found = {name: None if p.grad is None else p.grad.to_dense() for name, p in model.named_parameters()}
    budget.assert_gradient(found, truth, weights=result.weights)
