"""Compiled steps whose tensors have values that the host reads, or that a model takes for granted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import metakern
from metakern.testing import budget, inputs
from metakern.testing.judge import Snapshot

compile_step = partial(metakern.compile_step, backend="eager")


class Packed(nn.Module):
    """A recurrent network that is given packed sequences, or makes them padded again."""

    def __init__(self, kind: type[nn.RNNBase], padded: bool = False) -> None:
        super().__init__()
        self.recurrent, self.head, self.padded = kind(4, 5), nn.Linear(5, 3), padded

    def forward(self, rows: Tensor, sizes: Tensor) -> Tensor:
        packed = PackedSequence(rows, sizes)
        if self.padded:
            return self.head(self.recurrent(pad_packed_sequence(packed)[0])[0].sum(0))
        left = self.recurrent(packed)[1]
        return self.head((left[0] if isinstance(left, tuple) else left)[-1])


def packed_batch(sizes: list[int], seed: int) -> Any:
    """Rows, how many examples each time step has, labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64)
    return (rows, torch.tensor(sizes)), torch.randint(0, 3, (sizes[0],), generator=generator)


def entropies(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(*batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(("kind", "padded"), [(nn.GRU, False), (nn.LSTM, False), (nn.RNN, False), (nn.GRU, True)])
def test_other_lengths_of_packed_sequences(kind: type[nn.RNNBase], padded: bool) -> None:
    """torch reads them out of sight; batches with as many rows, but other lengths, run uncompiled."""
    torch.manual_seed(0)
    model = Packed(kind, padded).double()
    meta_batch = packed_batch([3, 2], 1)
    step = compile_step(model, packed_batch([4, 3, 2, 2, 1], 0), meta_batch, loss_fn=entropies)
    for sizes in [4, 3, 2, 2, 1], [4, 4, 2, 1, 1]:
        given = packed_batch(sizes, 2), meta_batch
        got = step(*given)
        want = metakern.l2rw_step(model, *given, loss_fn=entropies)
        budget.assert_within(got.losses, want.losses, 1.0, terms=100)
        budget.assert_within(got.weights, want.weights, 1.0, terms=1000)


def test_packing_is_refused_by_name() -> None:
    class Packing(Packed):
        def forward(self, rows: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
            return super().forward(packed.data, packed.batch_sizes)

    def batch(n: int) -> Any:
        return (torch.ones(n, 3, 4, dtype=torch.float64), torch.tensor([3, 1, 2, 3][:n])), torch.zeros(
            n, dtype=torch.long
        )

    with pytest.raises(NotImplementedError, match="_pack_padded_sequence makes a tensor whose size depends on values"):
        compile_step(Packing(nn.GRU).double(), batch(4), batch(2), loss_fn=entropies)


def test_inference_mode_around_a_compiled_step() -> None:
    """It would leave gradients that no optimizer can use."""
    model, batches = nn.Linear(6, 3).double(), inputs.pair(8, 3, 6, classes=3)
    step = compile_step(model, *batches)
    before = Snapshot.of(model)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside torch\.inference_mode"):
        step(*batches)
    before.assert_unchanged(model)


def test_models_that_take_few_values() -> None:
    """Before it is compiled, a step is also run on other values; a model may have none."""

    def losses(model: nn.Module, batch: Any) -> Tensor:
        if not bool((batch[0].sum(1) == 1.0).all()):
            raise ValueError("rows must be probabilities")
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model = nn.Linear(4, 3).double()
    batch, meta_batch = ((torch.eye(4, dtype=torch.float64)[:n], torch.zeros(n, dtype=torch.long)) for n in (4, 2))
    step = compile_step(model, batch, meta_batch, loss_fn=losses)
    want = metakern.l2rw_step(model, batch, meta_batch, loss_fn=losses)
    assert torch.equal(step(batch, meta_batch).losses, want.losses)
