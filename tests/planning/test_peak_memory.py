"""What `metakern.plan` foretells of memory, and of operations by parts, is what is counted."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from benchmarks.measure import count
from metakern.engines import pose
from metakern.planning.peak_memory import Memory, by_forward_mode
from metakern.testing import inputs
from metakern.testing.judge import Snapshot
from metakern.testing.models import Block, Transformer, conv_net, lenet, mlp
from metakern.testing.networks import convnext, resnet

Batch = tuple[Tensor, Tensor]
WITHIN = 0.03


def images(n: int, m: int, *shape: int) -> tuple[Batch, Batch]:
    """Not of `inputs.pair`, whose images are vectors."""
    train, meta = (
        (inputs.normal(size, *shape, seed=seed, dtype=torch.float32), inputs.labels(size, classes=10, seed=seed))
        for seed, size in ((1, n), (2, m))
    )
    return train, meta


def tokens(n: int, m: int) -> tuple[Batch, Batch]:
    train, meta = (
        (inputs.labels(size, 16, classes=50, seed=seed), inputs.labels(size, classes=10, seed=seed))
        for seed, size in ((1, n), (2, m))
    )
    return train, meta


def transformer(fused: bool = False) -> nn.Module:
    return Transformer(width=32, depth=2, heads=2, classes=10, vocabulary=50, fused=fused)


class Tied(nn.Module):
    """A language model whose head has the weight of its embedding."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.block, self.norm = Block(width, 4, fused=True), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embedding(tokens)))).transpose(1, 2)


class Albert(nn.Module):
    """One block, used again and again.

    Source: Lan et al., ALBERT, ICLR 2020.
    """

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.embedding, self.up = nn.Embedding(50, 16), nn.Linear(16, width)
        self.block, self.head, self.times = Block(width, 4, fused=True), nn.Linear(width, 10), times

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up(self.embedding(tokens))
        for _ in range(self.times):
            x = self.block(x)
        return self.head(x.mean(1))


class Repeated(nn.Module):
    """A layer used three times, and for the last time transposed or not."""

    def __init__(self, layer: nn.Module, transposed: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.transposed = layer, nn.LazyLinear(10), transposed

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        if self.transposed:
            x = F.linear(x, self.layer.weight.t())  # pyright: ignore
        return self.head(x.flatten(1))


def repeated(layer: nn.Module, example: Tensor, transposed: bool = False) -> nn.Module:
    model = Repeated(layer, transposed)
    model(example)
    return model


def texts(n: int, m: int, vocabulary: int) -> tuple[Batch, Batch]:
    """With a token to be foretold at each position."""
    train, meta = (
        tuple(inputs.labels(size, 16, classes=vocabulary, seed=seed) for seed in (place, place + 1))
        for place, size in ((1, n), (11, m))
    )
    return train, meta


def with_batch_norm(inplace: bool) -> nn.Module:
    """Values written over by activations are not those that the first pass knew."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.LeakyReLU(inplace=inplace), nn.BatchNorm2d(16)),
        *(nn.ReLU(inplace=inplace), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def contrast(model: nn.Module, batch: Batch) -> Tensor:
    """Examples are told apart from one another."""
    directions = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(directions @ directions.T / 0.5, batch[1] % len(batch[1]), reduction="none")


def counted(model: nn.Module, batch: Batch, meta_batch: Batch, **settings: object) -> tuple[int, int]:
    """Operations and peak of a step in which every example carries weight."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        metakern.reweight_step(model, batch, meta_batch, rule=torch.ones_like, **settings)  # pyright: ignore

    step()
    _, operations, peak = count(step, "cpu")
    model.zero_grad(set_to_none=True)
    return operations, peak


def assert_memory_foretold(found: Memory | None, model: nn.Module, *given: object, **settings: object) -> None:
    assert found is not None
    for memory, foretold in (("reuse", found.reuse), ("two_pass", found.two_pass)):
        _, peak = counted(model, *given, memory=memory, **settings)  # pyright: ignore
        assert foretold == pytest.approx(peak, rel=WITHIN), memory


WHOLE: dict[str, tuple[Callable[[], nn.Module], tuple[Batch, Batch]]] = {
    "mlp": (lambda: mlp(64, 3), images(128, 32, 64)),
    "mlp, pairs": (lambda: mlp(1024, 2), images(64, 8, 1024)),
    "lenet": (lambda: lenet(10), images(32, 8, 1, 28, 28)),
    "convolutions": (lambda: conv_net(16), images(32, 8, 3, 32, 32)),
    "transformer": (transformer, tokens(32, 8)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_batches(name: str) -> None:
    make, batches = WHOLE[name]
    model = make()
    assert_memory_foretold(metakern.plan(model, *batches).memory, model, *batches)


SHARED: dict[str, tuple[Callable[[], nn.Module], tuple[Batch, Batch]]] = {
    "tied, large": (lambda: Tied(2000, 64), texts(4, 1, 2000)),
    "tied, many tokens": (lambda: Tied(500, 64), texts(32, 8, 500)),
    "linear, large": (lambda: repeated(nn.Linear(512, 512), torch.ones(1, 512)), images(16, 4, 512)),
    "linear, many rows": (lambda: repeated(nn.Linear(256, 256), torch.ones(1, 256)), images(128, 16, 256)),
    "transposed": (lambda: repeated(nn.Linear(512, 512), torch.ones(1, 512), True), images(16, 4, 512)),
    "convolution": (
        lambda: repeated(nn.Conv2d(64, 64, 3, padding=1), torch.ones(1, 64, 4, 4)),
        images(4, 1, 64, 4, 4),
    ),
    "block": (lambda: Albert(128, 4), tokens(2, 1)),
    "block, many tokens": (lambda: Albert(64, 4), tokens(32, 8)),
}
"""Parameters that are used more than once."""


@pytest.mark.parametrize("name", SHARED)
def test_shared_parameters(name: str) -> None:
    """Gradients wait for those of other uses, and are added up in place or not."""
    make, batches = SHARED[name]
    model = make()
    found = metakern.plan(model, *batches).memory
    assert_memory_foretold(found, model, *batches)
    assert_memory_foretold(by_forward_mode(pose(model, *batches, None, None, "reuse")), model, *batches, engine="jvp")

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()

    assert found is not None
    assert found.plain == pytest.approx(count(plain, "cpu")[2], rel=WITHIN)


def test_a_tied_table_has_one_gradient() -> None:
    """Rows are added in place to what the head gave, where autograd has two tables and their sum. The dots do not run
    over the table, since its V would be the peak.
    """
    model, batches = Tied(2000, 64), texts(1, 1, 2000)
    found = metakern.plan(model, *batches, params="block.*").memory
    assert_memory_foretold(found, model, *batches, params="block.*")
    assert found is not None
    assert found.gradient == found.reuse < 0.5 * found.plain


@pytest.mark.parametrize("size", [8, 4])
@pytest.mark.parametrize("name", ["lenet", "convolutions", "transformer"])
def test_by_parts(name: str, size: int) -> None:
    """The meta batch is one part, or two."""
    make, batches = WHOLE[name]
    model = make()
    found = metakern.plan(model, *batches, micro_batch=size)
    assert_memory_foretold(found.memory, model, *batches, micro_batch=size)
    assert found.memory is not None
    whole = metakern.plan(model, *batches).memory
    assert whole is not None
    assert found.memory.plain == pytest.approx(whole.plain, rel=WITHIN)


def test_operations_by_parts() -> None:
    make, batches = WHOLE["convolutions"]
    model = make()
    before = Snapshot.of(model)
    found = metakern.plan(model, *batches, micro_batch=8)
    before.assert_unchanged(model)
    operations, _ = counted(model, *batches, micro_batch=8)
    assert found.step_flops() == found.step_flops(1.0) == pytest.approx(operations, rel=0.05)
    assert found.plain_flops == pytest.approx(metakern.plan(model, *batches).plain_flops, rel=0.01)
    assert str(found).endswith("engine: ghost, 8 examples at a time")


def test_wide_layers_by_parts_take_a_direction() -> None:
    """V is there before the parts are, so nothing is gained by pairs; gradients of the parts are added up."""
    model, batches = mlp(1024, 2), images(32, 4, 1024)
    assert "pairs" in {use.form for use in metakern.plan(model, *batches).uses}
    found = metakern.plan(model, *batches, micro_batch=8)
    assert {use.form for use in found.uses} == {"direction"}
    assert_memory_foretold(found.memory, model, *batches, micro_batch=8)


def test_a_part_as_large_as_the_batch_is_none() -> None:
    model, batches = mlp(8, 1), images(6, 3, 8)
    assert metakern.plan(model, *batches, micro_batch=6) == metakern.plan(model, *batches)


def test_parts_are_refused_where_the_step_refuses_them() -> None:
    model, batches = with_batch_norm(False), images(8, 4, 3, 8, 8)
    with pytest.raises(NotImplementedError, match="examples interact"):
        metakern.plan(model, *batches, micro_batch=4)
    with pytest.raises(ValueError, match="micro_batch must be None or a positive int"):
        metakern.plan(model, *batches, micro_batch=0)


COUPLED: dict[str, tuple[Callable[[], nn.Module], tuple[Batch, Batch]]] = {
    "batch norm": (lambda: with_batch_norm(False), images(32, 8, 3, 16, 16)),
    "in place": (lambda: with_batch_norm(True), images(32, 8, 3, 16, 16)),
    "convolutions": (lambda: conv_net(16, normalised=True), images(32, 8, 3, 16, 16)),
    "residual": (lambda: resnet(8, 8), images(32, 8, 3, 16, 16)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_forward_mode(name: str) -> None:
    make, batches = COUPLED[name]
    model = make()
    before = Snapshot.of(model)
    found = metakern.plan(model, *batches)
    before.assert_unchanged(model)
    assert found.engine == "jvp"
    assert_memory_foretold(found.memory, model, *batches)


def test_forward_mode_of_a_coupled_loss() -> None:
    """Nothing is left of the pass by which ghost finds out."""
    model, batches = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), images(256, 64, 64)
    found = metakern.plan(model, *batches, loss_fn=contrast)
    assert_memory_foretold(found.memory, model, *batches, loss_fn=contrast)


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[Batch, Batch]]] = {
    "fused attention": (lambda: transformer(fused=True), tokens(32, 8)),
    "layer norm": (lambda: convnext(16), images(16, 4, 3, 16, 16)),
    "linear": WHOLE["mlp"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_forward_mode_of_other_layers(name: str) -> None:
    """Asked for by name, since ghost serves them."""
    make, batches = OTHERS[name]
    model = make()
    foretold = by_forward_mode(pose(model, *batches, None, None, "reuse"))
    assert_memory_foretold(foretold, model, *batches, engine="jvp")
