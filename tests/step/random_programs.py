"""Programs put together at random from calls that mix parameters and activations, over sizes that are easily mistaken
for one another: as many positions or channels as examples, axes exchanged, folded, and selected by data.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metakern.testing.catalogue.case import Setup


class Part(nn.Module):
    """function(x, *parameters), [n, positions, channels] to the same with other sizes."""

    def __init__(self, function: Callable[..., Tensor], parameters: list[Tensor]) -> None:
        super().__init__()
        self._function, self.held = function, nn.ParameterList(parameters)

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x, *self.held)


class Draft:
    """A program in the making: the sizes reached so far, and what chance decides."""

    def __init__(self, seed: int) -> None:
        self.random, self._generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.examples, self.meta_examples = self.random.randint(2, 6), self.random.randint(1, 5)
        self.positions = self.random.choice((1, 2, 3, 4, self.examples))
        self.channels = self.random.choice((2, 3, 4, 6, self.examples))

    def part(
        self,
        function: Callable[..., Tensor],
        *shapes: tuple[int, ...],
        positions: int | None = None,
        channels: int | None = None,
    ) -> Part:
        """With parameters of these shapes; leads to so many positions and channels, by default as many as before."""
        self.positions = self.positions if positions is None else positions
        self.channels = self.channels if channels is None else channels
        return Part(function, [self.normal(*shape) / max(shape[-1:] or (1,)) ** 0.5 for shape in shapes])

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self._generator, dtype=torch.float64)

    def labels(self, examples: int) -> Tensor:
        return torch.randint(3, (examples,), generator=self._generator)

    def rarely(self) -> bool:
        return self.random.random() < 0.3


PIECES: dict[str, Callable[[Draft], Part | None]] = {}
"""By name; None where a piece does not fit the sizes, or is left out."""


def piece(make: Callable[[Draft], Part | None]) -> Callable[[Draft], Part | None]:
    PIECES[make.__name__] = make
    return make


@piece
def linear(d: Draft) -> Part:
    out = d.random.choice((2, 3, 4, d.examples))
    return d.part(F.linear, (out, d.channels), (out,), channels=out)


@piece
def used_twice(d: Draft) -> Part:
    c = d.channels
    return d.part(lambda x, w, b: F.linear(F.linear(x, w, b).tanh(), w.t(), b), (c, c), (c,))


@piece
def positions_mixed(d: Draft) -> Part:
    out = d.random.choice((1, 2, 3, d.examples))
    return d.part(lambda x, w: w @ x, (out, d.positions), positions=out)


@piece
def matrix_of_each_position(d: Draft) -> Part:
    return d.part(lambda x, w: torch.einsum("ntd,tdo->nto", x, w), (d.positions, d.channels, 2), channels=2)


@piece
def heads(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("ntd,hdo->nhto", x, w).transpose(1, 2).flatten(2)

    return d.part(call, (2, d.channels, 2), channels=4)


@piece
def rows_folded(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(b, x.reshape(-1, x.shape[2]), w).view(len(x), -1, 3)

    return d.part(call, (d.channels, 3), (3,), channels=3)


@piece
def positions_first(d: Draft) -> Part:
    return d.part(lambda x, w: (x.transpose(0, 1).contiguous() @ w).transpose(0, 1), (d.channels, 3), channels=3)


@piece
def convolution(d: Draft) -> Part:
    size = 1 if d.positions < 3 else d.random.choice((1, 3))
    padding = d.random.choice((0, size // 2))

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv1d(x.transpose(1, 2), w, b, padding=padding).transpose(1, 2)

    after = d.positions + 2 * padding - size + 1
    return d.part(call, (4, d.channels, size), (4,), positions=after, channels=4)


@piece
def transposed_convolution(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return F.conv_transpose1d(x.transpose(1, 2), w).transpose(1, 2)

    return d.part(call, (d.channels, 3, 2), positions=d.positions + 1, channels=3)


@piece
def factor(d: Draft) -> Part:
    shapes = ((d.channels,), (d.positions, 1), (1,), (d.positions, d.channels), ())
    return d.part(torch.mul, d.random.choice(shapes))


@piece
def summand(d: Draft) -> Part:
    shapes = ((d.channels,), (d.positions, 1), (1,), (d.positions, d.channels), ())
    return d.part(lambda x, w: torch.sub(w, x, alpha=0.5), d.random.choice(shapes))


@piece
def written_in_place(d: Draft) -> Part:
    place = d.random.randrange(d.positions)

    def call(x: Tensor, w: Tensor) -> Tensor:
        y = x.clone()
        y[:, place] *= w
        return y.add_(w)

    return d.part(call, (d.channels,))


@piece
def layer_norm(d: Draft) -> Part:
    return d.part(lambda x, w, b: F.layer_norm(x, w.shape, w, b, eps=0.1), (d.channels,), (d.channels,))


@piece
def batch_norm(d: Draft) -> Part | None:
    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (x - x.mean((0, 1))) / (x.var((0, 1), correction=0) + 0.1).sqrt() * w + b

    return d.part(call, (d.channels,), (d.channels,)) if d.rarely() else None


@piece
def attention(d: Draft) -> Part:
    causal = d.random.random() < 0.5

    def call(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x @ q, x @ k, x @ v, is_causal=causal)

    return d.part(call, *[(d.channels, d.channels)] * 3)


@piece
def attention_to_parameters(d: Draft) -> Part:
    def call(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (x @ k.t()).softmax(-1) @ v.expand(len(x), -1, -1)

    return d.part(call, (3, d.channels), (3, d.channels))


@piece
def class_token(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([w.expand(len(x), -1, -1), x], 1)

    return d.part(call, (1, 1, d.channels), positions=d.positions + 1)


@piece
def halves_coupled(d: Draft) -> Part | None:
    half = d.channels // 2

    def call(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a, b * (a @ s).tanh().exp() + a @ w], -1)

    return None if d.channels % 2 else d.part(call, (half, half), (half, half))


@piece
def matrix_made_of_each_example(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(x, (x.mean(1) @ w).view(len(x), -1, 2)).asinh()

    return d.part(call, (d.channels, d.channels * 2), channels=2)


@piece
def matrix_made_of_parameters(d: Draft) -> Part:
    return d.part(lambda x, a, b: F.linear(x, (a @ b).tanh()), (2, 3), (3, d.channels), channels=2)


@piece
def prototypes(d: Draft) -> Part:
    return d.part(lambda x, w: -(x[:, :, None] - w).square().sum(-1).asinh(), (4, d.channels), channels=4)


@piece
def rows_of_a_table(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return x + F.embedding((x.sum(-1).detach() * 3).long().abs() % 5, w)

    return d.part(call, (5, d.channels))


@piece
def experts_by_index(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("ntd,ntdo->nto", x, w[(x.sum(-1) > 0).long()])

    return d.part(call, (2, d.channels, d.channels))


@piece
def experts_by_mask(d: Draft) -> Part:
    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[2])
        first, out = rows.sum(-1) > 0, torch.zeros_like(rows)
        out[first], out[~first] = rows[first] @ a, rows[~first] @ b
        return out.view_as(x)

    return d.part(call, (d.channels, d.channels), (d.channels, d.channels))


@piece
def chosen_entry_by_entry(d: Draft) -> Part:
    return d.part(lambda x, w: torch.where(x > 0, x, w * x.tanh()), (d.channels,))


@piece
def checkpointed(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return checkpoint(lambda x: torch.tanh(x @ w), x, use_reentrant=False)

    return d.part(call, (d.channels, d.channels))


@piece
def recurrence(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        states = [x[:, 0]]
        for t in range(x.shape[1]):
            states.append(torch.tanh(states[-1] @ w + x[:, t]))
        return torch.stack(states, 1)

    return d.part(call, (d.channels, d.channels), positions=d.positions + 1)


@piece
def loop_over_examples(d: Draft) -> Part | None:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.stack([(each @ w).tanh() for each in x])

    return d.part(call, (d.channels, d.channels)) if d.rarely() else None


@piece
def vmapped(d: Draft) -> Part | None:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.vmap(lambda each: torch.tanh(each @ w))(x)

    return d.part(call, (d.channels, 3), channels=3) if d.rarely() else None


@piece
def two_views_of_each_example(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        first, second = (torch.cat([x, x.flip(1)]) @ w).chunk(2)
        return (first * second).asinh()

    return d.part(call, (d.channels, 2), channels=2)


@piece
def examples_repeated(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return (x.repeat_interleave(2, 0) @ w).unflatten(0, (-1, 2)).mean(1)

    return d.part(call, (d.channels, 2), channels=2)


@piece
def spectrum(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x, dim=1) * w, n=x.shape[1], dim=1)

    return d.part(call, (d.positions // 2 + 1, d.channels))


@piece
def scattered(d: Draft) -> Part:
    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter_add(1, (x * 2).long().abs() % x.shape[1], x * w)

    return d.part(call, (d.channels,))


@piece
def axes_exchanged(d: Draft) -> Part:
    return d.part(lambda x: x.transpose(1, 2), positions=d.channels, channels=d.positions)


@piece
def flattened(d: Draft) -> Part:
    return d.part(lambda x: x.reshape(len(x), 1, -1), positions=1, channels=d.positions * d.channels)


@piece
def largest_positions(d: Draft) -> Part | None:
    def call(x: Tensor) -> Tensor:
        return x.gather(1, x[:, :, :1].topk(2, 1).indices.expand(-1, -1, x.shape[2]))

    return d.part(call, positions=2) if d.positions >= 2 else None


@piece
def values_alone(d: Draft) -> Part:
    calls: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x.clone().relu_(),
        lambda x: x.softmax(1),
        lambda x: x.cumsum(1).asinh(),
        lambda x: x.sort(1).values,
        lambda x: x.roll(1, 2),
        F.gelu,
    )
    return d.part(d.random.choice(calls))


class Program(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * torch.atan(super().forward(input))  # bounded: a saturated loss has gradients below its own rounding


def losses_by_position(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    outputs, labels = model(batch[0]), batch[1]
    return F.cross_entropy(outputs.transpose(1, 2), labels[:, None].expand(outputs.shape[:2]), reduction="none").mean(1)


def losses_of_means(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).mean(1) - F.one_hot(batch[1], 3)).square().sum(1)


def program(seed: int) -> tuple[Setup, list[str]]:
    """A program with its batches, and the names of its pieces."""
    d = Draft(seed)
    batch, meta_batch = (
        (d.normal(count, d.positions, d.channels), d.labels(count)) for count in (d.examples, d.meta_examples)
    )
    chosen, parts = list[str](), list[nn.Module]()
    for name in d.random.choices(list(PIECES), k=d.random.randint(1, 7)):
        part = PIECES[name](d)
        if part is not None:
            chosen.append(name)
            parts.append(part)
    head = d.part(F.linear, (3, d.channels), (3,))
    loss_fn = d.random.choice((losses_by_position, losses_of_means))
    return Setup(Program(*parts, head), batch, meta_batch, loss_fn=loss_fn, interacting=True), chosen
