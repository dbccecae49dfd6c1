"""Products of sparse matrices: every function that makes them, and steps whose batches are sparse in part."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.layers.forward.forward_mode import dual_level
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step
from metakern.testing.oracle import clip_normalise

Batch = tuple[Tensor, Tensor]
LAYOUTS = pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["coo", "csr"])
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "@": lambda a, w, b: a @ w,
    "matmul": lambda a, w, b: torch.matmul(a, other=w),
    "method": lambda a, w, b: a.mm(w),
    "sparse.mm": lambda a, w, b: torch.sparse.mm(a, w),
    "linear": lambda a, w, b: F.linear(a, w.t()),
    "linear with bias": lambda a, w, b: F.linear(a, w.t(), bias=b),
    "addmm": lambda a, w, b: torch.addmm(b.expand(a.shape[0], -1), a, w, beta=0.5, alpha=2.0),
    "addmm of a bias": lambda a, w, b: torch.addmm(b, a, w),
    "sparse.addmm": lambda a, w, b: torch.sparse.addmm(b.expand(a.shape[0], -1).contiguous(), a, w),
}
OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mv": lambda a, w, b: torch.stack([torch.mv(a, column) for column in w.unbind(1)], 1),
    "bmm": lambda a, w, b: torch.bmm(torch.stack([a.to_sparse_coo()]), w.unsqueeze(0)).squeeze(0),
    "from the right": lambda a, w, b: (w.t() @ a.t()).t(),
}


def sparse(rows: int, layout: torch.layout, seed: int = 0) -> Tensor:
    return inputs.normal(rows, 7, seed=seed).clamp_min(0).to_sparse(layout=layout)


class Network(nn.Module):
    """Sparse features, held by the model for batches of two sizes, beside what the examples bring."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor], layout: torch.layout, n: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.product, self.features = product, {size: sparse(size, layout, seed=size) for size in (n, 3)}
        self.weight, self.bias = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.product(self.features[len(x)], self.weight, self.bias) + x + self.bias))


@LAYOUTS
@pytest.mark.parametrize("engine", ["ghost", "jvp"])
@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
def test_every_function(name: str, engine: str, layout: torch.layout) -> None:
    model = Network({**PRODUCTS, **OTHERS}[name], layout, 6).double()
    setup = Setup(model, *inputs.pair(6, 3, 5, classes=3), interacting=True)  # rows are looked up by the batch's size
    judge_step(metakern.l2rw_step, setup, engine=engine)


@LAYOUTS
@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
def test_tangents_of_either_operand_and_of_what_is_added(name: str, layout: torch.layout) -> None:
    a, w, b = sparse(4, layout), inputs.normal(7, 5, seed=1), inputs.normal(5, seed=2)
    dw, db = inputs.normal(7, 5, seed=3), inputs.normal(5, seed=4)
    product = {**PRODUCTS, **OTHERS}[name]
    with dual_level():
        output = product(a, forward_ad.make_dual(w, dw), forward_ad.make_dual(b, db))
        value, tangent = forward_ad.unpack_dual(output)
    budget.assert_within(value, product(a, w, b), 10.0)
    budget.assert_within(tangent, product(a, w + dw, b + db) - product(a, w, b), 100.0)


@LAYOUTS
def test_its_rule_keeps_the_features_sparse(layout: torch.layout) -> None:
    x, y = sparse(6, layout), inputs.labels(6, classes=3)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    uses = metakern.explain(model, (x, y), (x, y)).uses
    assert [use.rule for use in uses] == ["sparse_product", "linear"]


@LAYOUTS
@pytest.mark.parametrize("sparse_part", ["batch", "meta_batch"])
@pytest.mark.parametrize("width", [5, 2048])
def test_one_batch_is_sparse_and_the_other_dense(layout: torch.layout, sparse_part: str, width: int) -> None:
    """A wide layer takes pairs of examples, and an implicit virtual step, where the train batch is dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 3)).double()
    batch, meta_batch = inputs.pair(6, 3, 7, classes=3)
    truth = Setup(model, batch, meta_batch).oracle()
    if sparse_part == "batch":
        batch = batch[0].to_sparse(layout=layout), batch[1]
    else:
        meta_batch = meta_batch[0].to_sparse(layout=layout), meta_batch[1]
    result = metakern.l2rw_step(model, batch, meta_batch)
    assert result.engine == "ghost"
    budget.assert_dots(result.dots, truth)
    budget.assert_gradient({name: p.grad for name, p in model.named_parameters()}, truth, weights=result.weights)
    budget.assert_within(result.weights, clip_normalise(truth.dots), 1.0)
    pairs = metakern.grad_dots(model, batch, meta_batch, pairwise=True).dots
    budget.assert_within(pairs.mean(1), truth.dots, truth.example_norms * truth.meta_norm)


class LabelNet(nn.Module):
    """A distribution for each target."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(inputs.normal(3, 3, seed=8))

    def forward(self, targets: Tensor) -> Tensor:
        return torch.softmax(self.table[targets], dim=1)


def _weight_net_step(model: nn.Module, net: nn.Module, batch: Batch, meta_batch: Batch) -> None:
    metakern.mwnet_step(model, net, batch, meta_batch, weight_optimizer=None, virtual_lr=0.1)


def _label_net_step(model: nn.Module, net: nn.Module, batch: Batch, meta_batch: Batch) -> None:
    metakern.mlc_step(model, net, batch, meta_batch, label_optimizer=None, virtual_lr=0.1)


@LAYOUTS
@pytest.mark.parametrize("sparse_parts", [{0}, {1}, {0, 1}], ids=["batch", "meta_batch", "both"])
@pytest.mark.parametrize("step", [_weight_net_step, _label_net_step])
def test_weight_nets_and_label_nets(step: Any, layout: torch.layout, sparse_parts: set[int]) -> None:
    """As with the same numbers in dense tensors; the wide layer's virtual step is implicit where the batch is dense."""
    torch.manual_seed(0)
    weight_net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())
    model = nn.Sequential(nn.Linear(7, 512), nn.Tanh(), nn.Linear(512, 3)).double()
    net = (weight_net if step is _weight_net_step else LabelNet()).double()
    found = []
    for parts in (sparse_parts, set()):
        pair = enumerate(inputs.pair(6, 3, 7, classes=3))
        net.zero_grad()
        step(model, net, *((x.to_sparse(layout=layout) if k in parts else x, y) for k, (x, y) in pair))
        found.append([p.grad for p in (*model.parameters(), *net.parameters())])
    for got, want in zip(*found, strict=True):
        budget.assert_within(got, want, 1 + want.abs(), terms=1000)


@LAYOUTS
def test_a_compiled_step_refuses(layout: torch.layout) -> None:
    model = nn.Linear(7, 3).double()
    batch = sparse(6, layout), inputs.labels(6, classes=3)
    with pytest.raises(NotImplementedError, match="reads a sparse tensor"):
        metakern.compile_step(model, batch, batch)
