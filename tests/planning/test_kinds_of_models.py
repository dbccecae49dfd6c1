"""What `metakern.plan` predicts for models that are no chain of layers, recurrent ones, and checkpoints."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metakern
from benchmarks import measure
from metakern.planning.pass_counts import counter
from tests.planning.test_peak_memory import WITHIN, Batch, assert_memory_foretold, counted, images, tokens

OPERATIONS = 0.02


class Skip(nn.Module):
    """The output gradient of the first layer waits, half formed, for the second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.first(x))
        return self.head(torch.cat([a, torch.relu(self.second(a))], 1))


class UNet(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.GroupNorm(4, channels)
        self.deep = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(2 * channels, channels, 2, 2), nn.Conv2d(2 * channels, 10, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.norm(self.down(x)))
        return self.out(torch.cat([a, self.up(torch.relu(self.deep(a)))], 1)).mean((2, 3))


class TextCNN(nn.Module):
    """Three convolutions of one input.

    Source: Kim, Convolutional neural networks for sentence classification, EMNLP 2014.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, width), nn.Linear(3 * width, 10)
        self.filters = nn.ModuleList(nn.Conv1d(width, width, size, padding=size // 2) for size in (3, 5, 7))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        return self.head(torch.cat([torch.relu(each(x)).amax(2) for each in self.filters], 1))


class Experts(nn.Module):
    """A mixture in which every expert sees every token."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.embedding, self.gate, self.head = nn.Embedding(50, width), nn.Linear(width, experts), nn.Linear(width, 10)
        self.up = nn.Parameter(inputs_of(experts, width, 2 * width))
        self.down = nn.Parameter(inputs_of(experts, 2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        hidden = torch.einsum("nti,eio->neto", x, self.up).relu()
        out = torch.einsum("neto,eod->netd", hidden, self.down)
        return self.head(torch.einsum("nte,netd->ntd", self.gate(x).softmax(-1), out).mean(1))


def inputs_of(*shape: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Queries, keys and values of one input, which is added to the result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, width), nn.Linear(width, 10)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Checkpointed(nn.Module):
    """Blocks that run again in the backward pass."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class Recurrent(nn.Module):
    """Of an embedding, or of the features themselves."""

    def __init__(self, layer: nn.Module, width: int, embedded: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32) if embedded else nn.Identity()
        self.layer, self.head = layer, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x))[0].mean(1))


class Cells(nn.Module):
    """A cell in a loop."""

    def __init__(self, cell: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding, self.cell, self.head = nn.Embedding(50, 32), cell, nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        state = None
        for x in self.embedding(tokens).unbind(1):
            state = self.cell(x, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


Case = tuple[Callable[[], nn.Module], tuple[Batch, Batch]]

FORKED: dict[str, Case] = {
    "skip": (lambda: Skip(128), images(256, 32, 128)),
    "unet": (lambda: UNet(16), images(16, 4, 3, 16, 16)),
    "text, convolutions": (lambda: TextCNN(32), tokens(64, 8)),
    "experts": (lambda: Experts(32, 4), tokens(32, 8)),
    "attention": (lambda: Attention(64), tokens(32, 8)),
    "checkpoints": (lambda: Checkpointed(128, 4), images(256, 32, 128)),
}
RECURRENT: dict[str, Case] = {
    "gru": (lambda: Recurrent(nn.GRU(32, 48, batch_first=True), 48), tokens(64, 8)),
    "gru, two directions": (
        lambda: Recurrent(nn.GRU(32, 24, 2, batch_first=True, bidirectional=True), 48),
        tokens(64, 8),
    ),
    "lstm": (lambda: Recurrent(nn.LSTM(32, 48, batch_first=True), 48), tokens(64, 8)),
    "lstm, features": (lambda: Recurrent(nn.LSTM(32, 48, 2, batch_first=True), 48, False), images(64, 8, 16, 32)),
    "rnn": (lambda: Recurrent(nn.RNN(32, 48, batch_first=True), 48), tokens(64, 8)),
    "gru cell": (lambda: Cells(nn.GRUCell(32, 48), 48), tokens(64, 8)),
    "lstm cell": (lambda: Cells(nn.LSTMCell(32, 48), 48), tokens(64, 8)),
}
CASES = FORKED | RECURRENT


def plain_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(batch[0]), batch[1]).backward()

    return step


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("experts", "gru, two directions")])
def test_memory(name: str) -> None:
    make, batches = CASES[name]
    model = make()
    found = metakern.plan(model, *batches)
    assert found.engine == "ghost"
    assert found.memory is not None
    assert_memory_foretold(found.memory, model, *batches)
    assert found.memory.plain == pytest.approx(measure.count(plain_step(model, batches[0]), "cpu")[2], rel=WITHIN)


def test_memory_of_a_part_of_the_examples() -> None:
    """The weighted gradient of experts copies the examples that are kept, unless all are."""
    make, batches = CASES["experts"]
    model = make()
    found = metakern.plan(model, *batches).memory
    assert found is not None

    def step() -> None:
        model.zero_grad(set_to_none=True)
        metakern.reweight_step(model, *batches, rule=lambda dots: (torch.arange(len(dots)) % 2).float())

    assert found.gradient == found.reuse == pytest.approx(measure.count(step, "cpu")[2], rel=WITHIN)
    assert found.reuse > 1.02 * counted(model, *batches)[1]


@pytest.mark.parametrize("name", CASES)
def test_operations(name: str) -> None:
    """An LSTM is one operator on a CPU, which torch's counter does not know of; the plan's does."""
    make, batches = CASES[name]
    model = make()
    found, weights = metakern.plan(model, *batches), (torch.arange(len(batches[0][1])) % 4 == 0).float()
    metakern.reweight_step(model, *batches, rule=lambda dots: weights)
    with counter() as step:
        metakern.reweight_step(model, *batches, rule=lambda dots: weights)
    assert found.step_flops(0.25) == pytest.approx(step.get_total_flops(), rel=OPERATIONS)
    with counter() as plain:
        plain_step(model, batches[0])()
    assert found.plain_flops == pytest.approx(plain.get_total_flops(), rel=OPERATIONS)


@pytest.mark.parametrize("name", ["gru", "gru, two directions", "gru cell"])
def test_operations_as_torch_counts_them(name: str) -> None:
    """Of layers whose products torch's counter knows."""
    make, batches = RECURRENT[name]
    model = make()
    found = metakern.plan(model, *batches)
    assert found.step_flops(1.0) == pytest.approx(counted(model, *batches)[0], rel=OPERATIONS)


@pytest.mark.parametrize("name", ["skip", "experts", "gru", "lstm"])
def test_by_parts(name: str) -> None:
    make, batches = CASES[name]
    model = make()
    found = metakern.plan(model, *batches, micro_batch=8)
    assert found.memory is not None
    assert_memory_foretold(found.memory, model, *batches, micro_batch=8)
    whole = metakern.plan(model, *batches)
    assert whole.memory is not None
    assert found.memory.plain == pytest.approx(whole.memory.plain, rel=WITHIN)
    assert found.plain_flops == pytest.approx(whole.plain_flops, rel=OPERATIONS)
    metakern.reweight_step(model, *batches, rule=torch.ones_like, micro_batch=8)
    with counter() as step:
        metakern.reweight_step(model, *batches, rule=torch.ones_like, micro_batch=8)
    assert found.step_flops() == pytest.approx(step.get_total_flops(), rel=0.05)
