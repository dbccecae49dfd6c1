"""What is proved on the first batch must hold for it alone: later ones come with other numbers, sizes and labels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step


class Network(nn.Module):
    """Two linear layers with something between them, which takes a number that is no part of the batch."""

    def __init__(self, between: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.between = between
        self.number: Any = None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.flatten(0, -2)))
        logits = self.head(torch.tanh(self.second(self.between(hidden, self.number))))
        return logits.view(len(x), -1, 3).mean(1)


def follow(network: nn.Module, *batches: Any, losses: Any = None, meta_batch: Any = None, **keywords: Any) -> list[str]:
    """Engines of steps on one batch after the other, each judged."""
    engines = []
    for batch in batches:
        meta = (
            meta_batch if meta_batch is not None else inputs.pair(2, len(batch[0]), *batch[0].shape[1:], classes=3)[1]
        )
        setup = Setup(network, batch, meta, losses, interacting=True)
        engines.append(judge_step(metakern.l2rw_step, setup, **keywords).result.engine)
        network.zero_grad()
    return engines


class Shifted(torch.autograd.Function):
    """Rows moved by NumPy, out of sight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shift: int) -> Tensor:
        ctx.shift = shift
        return torch.from_numpy(np.roll(hidden.detach().numpy(), shift, 0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return torch.from_numpy(np.roll(grad.numpy(), -ctx.shift, 0)), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:  # type: ignore[override]
        return tangent.roll(ctx.shift, 0)


NUMBERS: dict[str, tuple[Callable[[Tensor, Any], Tensor], Any, Any]] = {
    "softmax": (lambda h, dim: h * h.softmax(dim), -1, -2),
    "cumsum": (lambda h, dim: h.cumsum(dim), 1, 0),
    "normalize": (lambda h, dim: F.normalize(h, dim=dim), 1, 0),
    "std": (lambda h, dim: h / (0.1 + h.std(dim, keepdim=True)), 1, 0),
    "amax": (lambda h, dim: h - h.amax(dim, keepdim=True), 1, 0),
    "median": (lambda h, dim: h - h.median(dim, keepdim=True).values, 1, 0),
    "padding": (lambda h, rows: F.pad(h, (0, 0, rows, -rows)), 0, 1),
    "pooling": (lambda h, size: F.avg_pool1d(h.t()[None], size, 1, size // 2)[0].t(), 1, 3),
    "unfold": (lambda h, rows: F.pad(h, (0, 0, rows, 0)).unfold(0, rows + 1, 1).mean(-1), 0, 1),
    "layer_norm": (lambda h, dim: F.layer_norm(h, h.shape[dim:]), 1, 0),
    "groups": (lambda h, size: (h.view(-1, size, 6) - h.view(-1, size, 6).mean(1, keepdim=True) / 2).view(-1, 6), 1, 2),
    "repeat_interleave": (lambda h, times: h.repeat_interleave(times, 0)[: len(h)], 1, 2),
    "list": (lambda h, order: h[order], [0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5]),
    "array": (lambda h, order: h[order], np.arange(6), np.array([1, 0, 2, 3, 4, 5])),
    "own function": (lambda h, shift: Shifted.apply(h, shift), 0, 1),
    "vmap": (lambda h, shift: torch.vmap(lambda c: c.roll(shift), in_dims=1, out_dims=1)(h), 0, 1),
    "interpolate": (lambda h, scale: F.interpolate(h.t()[None], scale_factor=scale)[0].t()[: len(h)], 1.0, 2.0),
    "shifted": (lambda h, shift: h[torch.arange(len(h)).add_(shift).remainder_(len(h))], 0, 1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_other_numbers(name: str) -> None:
    """The same operations at the same sizes; rows are mixed only with the second number."""
    between, apart, mixed = NUMBERS[name]
    network, found = Network(between), []
    for k, number in enumerate((apart, mixed, apart)):
        network.number = number
        found += follow(network, inputs.pair(6, 6, 4, classes=3, seed=k)[0])
    assert found == ["ghost", "jvp", "ghost"]


def test_sizes_at_which_groups_are_single_examples() -> None:
    def in_eight(hidden: Tensor, _: Any) -> Tensor:
        groups = hidden.view(min(8, len(hidden)), -1, 6)
        return (groups - groups.mean(1, keepdim=True) / 2).view_as(hidden)

    batches = [inputs.pair(n, n, 4, classes=3, seed=n)[0] for n in (8, 16, 8)]
    assert follow(Network(in_eight), *batches) == ["ghost", "jvp", "ghost"]


def test_windows_that_do_not_end_with_their_example() -> None:
    """Windows of two tokens over all tokens of the batch: four tokens per example are whole windows, three are not."""

    def windows(hidden: Tensor, _: Any) -> Tensor:
        two = hidden.view(-1, 2, 6)
        return (two - two.mean(1, keepdim=True) / 2).view_as(hidden)

    batches = [inputs.pair(6, 6, tokens, 4, classes=3, seed=tokens)[0] for tokens in (4, 3)]
    meta_batch = inputs.pair(4, 2, 4, 4, classes=3, seed=9)[1]
    assert follow(Network(windows), *batches, meta_batch=meta_batch) == ["ghost", "jvp"]


SUMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "scatter_add": lambda zeros, owner, tokens: zeros.scatter_add(0, owner, tokens),
    "index_add": lambda zeros, owner, tokens: zeros.index_add(0, owner, tokens),
    "scatter_reduce": lambda zeros, owner, tokens: zeros.scatter_reduce(0, owner, tokens, "mean", include_self=False),
    "index_put": lambda zeros, owner, tokens: zeros.index_put((owner,), tokens, accumulate=True),
    "put": lambda zeros, owner, tokens: zeros.put(owner, tokens, accumulate=True),
}


@pytest.mark.parametrize("name", SUMS)
def test_tokens_gathered_into_losses(name: str) -> None:
    """Losses of tokens are added into zeros, which hold no activation themselves."""

    def losses(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        tokens, labels, owner = batch
        each = F.cross_entropy(network(tokens[:, None]), labels, reduction="none")
        return SUMS[name](torch.zeros(int(owner.max()) + 1, dtype=each.dtype), owner, each)

    batches = [
        (inputs.normal(6, 4, seed=k), inputs.labels(6, classes=3, seed=k), torch.tensor(owner))
        for k, owner in enumerate(([0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2], [2, 1, 0, 0, 1, 2]))
    ]
    network = Network(lambda hidden, _: hidden)
    assert follow(network, *batches, losses=losses, meta_batch=batches[0]) == ["ghost", "jvp", "jvp"]


PICKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_select": lambda h, order: h.index_select(1, order),
    "index": lambda h, order: h[:, order],
    "gather": lambda h, order: h.gather(1, order[None, :, None].expand_as(h)),
    "index_copy": lambda h, order: torch.zeros_like(h).index_copy(1, order.argsort(), h),
}


@pytest.mark.parametrize("name", PICKS)
def test_examples_along_the_second_dimension_are_sorted(name: str) -> None:
    def losses(network: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        tokens, labels, order = batch
        hidden = torch.tanh(network.first(tokens))
        hidden = torch.tanh(network.second(PICKS[name](hidden, order)))
        logits = network.head(PICKS[name](hidden, order.argsort()).mean(0))
        return F.cross_entropy(logits, labels, reduction="none")

    batches = [
        (inputs.normal(3, 4, 4, seed=k), inputs.labels(4, classes=3, seed=k), torch.tensor(order))
        for k, order in enumerate(([0, 1, 2, 3], [2, 0, 3, 1]))
    ]
    network = Network(lambda hidden, _: hidden)
    assert follow(network, *batches, losses=losses, meta_batch=batches[0]) == ["ghost", "jvp"]


def test_picks_along_other_dimensions_than_the_examples_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many classes as examples: `gather` along the classes is seen to leave the examples alone, once."""
    from metakern.capture.independence import examples

    def losses(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -network(batch[0][:, None]).log_softmax(1).gather(1, batch[1][:, None])[:, 0]

    first, second = (inputs.pair(3, 3, 4, classes=3, seed=k)[0] for k in range(2))
    network = Network(lambda hidden, _: hidden)
    assert follow(network, first, losses=losses, meta_batch=first) == ["ghost"]
    monkeypatch.setattr(examples, "require_order", None)
    assert follow(network, second, losses=losses, meta_batch=first) == ["ghost"]


@pytest.mark.parametrize("labelled", [0, 1])
def test_examples_without_a_label_at_first(labelled: int) -> None:
    """Each example looks at those before it; while only the first has a label, none of that shows in a gradient."""

    def running(hidden: Tensor, _: Any) -> Tensor:
        return hidden - hidden.cumsum(0) / 8

    inputs_, labels = inputs.pair(6, 6, 4, classes=3)[0]
    ignored = torch.where(torch.arange(6) < labelled, labels, -100)
    meta_batch = inputs.pair(6, 3, 4, classes=3, seed=3)[1]
    found = follow(Network(running), (inputs_, ignored), (inputs_, labels), meta_batch=meta_batch)
    assert found[1] == "jvp"


@pytest.mark.parametrize("without_nan", [torch.nan_to_num, torch.nansum, torch.nanmean])
def test_a_hinge_behind_what_leaves_out_nan(without_nan: Callable[..., Tensor]) -> None:
    def between(hidden: Tensor, threshold: Any) -> Tensor:
        if without_nan is torch.nan_to_num:
            return hidden + F.relu(torch.nan_to_num(hidden.mean(0)) - threshold)
        return hidden + F.relu(without_nan(hidden, 0) - threshold)

    network = Network(between)
    for k, network.number in enumerate((9.0, -1.0)):
        assert follow(network, inputs.pair(6, 6, 4, classes=3, seed=k)[0]) == ["jvp"]


DISTURBED: dict[str, Callable[[Tensor], Tensor]] = {
    "clipped": lambda grad: grad.clamp(-50, 50),  # far above what this batch has
    "clipped by norm": lambda grad: grad / grad.norm(dim=1, keepdim=True).clamp(min=1e-3),
    "noise": lambda grad: grad + 0.1,
    "dropped": lambda grad: F.dropout(grad, 0.5),
}


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("name", DISTURBED)
def test_gradients_that_do_not_scale_with_the_losses(name: str, memory: str) -> None:
    """What hooks make of gradients must be linear: dots and weighted gradient would be of different things."""

    def hooked(hidden: Tensor, _: Any) -> Tensor:
        if hidden.requires_grad:
            hidden.register_hook(DISTURBED[name])
        return hidden

    batch, meta_batch = inputs.pair(6, 3, 4, classes=3)
    with pytest.raises(NotImplementedError, match="does not scale with the losses"):
        metakern.l2rw_step(Network(hooked), batch, meta_batch, memory=memory)


def test_anomaly_detection_does_not_mind_the_proof() -> None:
    network = Network(lambda hidden, _: hidden)
    with torch.autograd.set_detect_anomaly(True):
        assert follow(network, inputs.pair(6, 6, 4, classes=3)[0]) == ["ghost"]
        assert torch.is_anomaly_enabled()
