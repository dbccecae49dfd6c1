"""What tensors held is put back, however they were written; large ones are copied only then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.capture.state.buffers import Buffers
from metakern.capture.state.contents import content_of
from metakern.capture.state.snapshot import LARGE, Snapshot, address
from metakern.testing import inputs

SIZES = [8, LARGE // 8]  # rows of 8


def rows_of(size: int) -> Tensor:
    return torch.arange(size * 8, dtype=torch.float32).view(size, 8).clone()  # no view: its memory is its own


WRITERS: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.add_(1),
    "by an index": lambda t: t.__setitem__(3, 0.0),
    "a row of it": lambda t: t[3].zero_(),
    "detached": lambda t: t.detach().mul_(2),
    "its data": lambda t: t.data.mul_(2),
    "an output": lambda t: torch.ones(len(t), 8, out=t),
    "NumPy": lambda t: t.numpy().fill(0),
    "where it lies": lambda t: t.untyped_storage().fill_(0),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_is_written_is_put_back(write: Callable[[Tensor], object], size: int) -> None:
    tensor, truth = rows_of(size), rows_of(size)
    kept, row = Snapshot(tensor), tensor[3]
    assert not kept.changed()
    write(tensor)
    assert kept.changed()
    assert not torch.equal(tensor, truth)
    kept.restore()
    assert not kept.changed()
    assert torch.equal(tensor, truth)
    assert torch.equal(row, truth[3])
    write(tensor)
    assert torch.equal(kept.value, truth)


@pytest.mark.parametrize("size", SIZES)
def test_other_memory_is_left_alone(size: int) -> None:
    tensor, other = rows_of(size), torch.ones(size, 8)
    kept = Snapshot(tensor)
    tensor.data = other
    kept.restore()
    assert torch.equal(tensor, rows_of(size))
    assert torch.equal(other, torch.ones(size, 8))


@pytest.mark.parametrize("size", SIZES)
def test_a_graph_that_saved_it_goes_on(size: int) -> None:
    tensor, weight = rows_of(size), torch.ones(8, requires_grad=True)
    output = (tensor * weight).sum()
    kept = Snapshot(tensor)
    tensor.mul_(3)
    kept.restore()
    (grad,) = torch.autograd.grad(output, weight)
    assert torch.equal(grad, rows_of(size).sum(0))


@pytest.mark.parametrize("size", SIZES)
def test_statistics_are_put_back(size: int) -> None:
    model = nn.BatchNorm1d(size * 8)
    before = model.running_mean.clone()
    kept = Buffers(model)
    model(torch.randn(3, size * 8) + 1)
    assert not torch.equal(model.running_mean, before)
    kept.restore()
    assert torch.equal(model.running_mean, before)


def test_of_a_large_tensor_nothing_is_copied_until_it_is_written() -> None:
    tensor = rows_of(LARGE // 8)
    place = address(tensor)
    first, second = Snapshot(tensor), Snapshot(tensor)
    tensor @ torch.randn(8, 3)
    tensor[torch.tensor([1, 2])].sum()
    first.restore()
    assert {address(tensor), address(first.value), address(second.value)} == {place}
    tensor.add_(1)
    assert address(tensor) != place
    assert torch.equal(first.value, second.value)


@pytest.mark.parametrize("shared", [lambda t: t.numpy(), lambda t: t[1:], lambda t: t.detach()])
def test_memory_that_others_hold_stays_theirs(shared: Callable[[Tensor], Tensor]) -> None:
    """An array of NumPy's would neither be seen to be written nor follow the tensor to other memory."""
    tensor = rows_of(LARGE // 8)
    place, other = address(tensor), shared(tensor)
    kept = Snapshot(tensor)
    other[3] = 7.0
    assert address(tensor) == place
    kept.restore()
    assert torch.equal(tensor, rows_of(LARGE // 8))
    tensor.fill_(5.0)
    assert float(other[3][0]) == 5.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.from_numpy(rows_of(LARGE // 8).numpy()),
        lambda: rows_of(LARGE // 8).t(),
        lambda: rows_of(LARGE // 8).to(torch.complex64),
        lambda: rows_of(LARGE // 8) > 3,
        lambda: torch.zeros(LARGE).share_memory_(),
        lambda: torch.eye(300).to_sparse(),
        lambda: torch.zeros(300, 300, requires_grad=True),
    ],
    ids=["from NumPy", "transposed", "complex", "truth", "between processes", "sparse", "trained"],
)
def test_any_kind_of_tensor(make: Callable[[], Tensor]) -> None:
    tensor = make()
    truth = tensor.detach().clone()
    back = content_of(tensor)
    assert back is not None
    tensor.data.zero_()
    back()
    assert torch.equal(tensor.detach().to_dense(), truth.to_dense())


class Bank(nn.Module):
    """A large memory that a forward pass reads and writes, and a table that it reads; examples interact."""

    def __init__(self, *, registered: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        bank, table = torch.ones(LARGE // 8, 8).double(), torch.ones(LARGE // 8, 8).double()
        if registered:
            self.register_buffer("bank", bank)
            self.register_buffer("table", table)
        else:
            self.bank, self.table = bank, table

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.layer(x)) * self.bank[: len(x)].mean() + self.table[0]
        self.bank.data[: len(x)] = 0.5 * self.bank[: len(x)] + h.detach()
        return self.head(h)


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_a_step_leaves_large_tensors_as_one_pass_does(registered: bool, fails: bool) -> None:
    torch.manual_seed(0)
    model, twin = Bank(registered=registered).double(), Bank(registered=registered).double()
    twin.load_state_dict(model.state_dict())
    batch, meta_batch = inputs.pair(6, 3, 8, classes=3)

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        found = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return found.log().log() if fails else found

    before, place = model.bank.clone(), address(model.table)
    for _ in range(3):
        if fails:
            with pytest.raises(ValueError, match="losses"):
                metakern.l2rw_step(model, batch, meta_batch, loss_fn=losses)
        else:
            metakern.l2rw_step(model, batch, meta_batch, loss_fn=losses)
            twin(batch[0])
            if not registered:  # what a pass of the meta batch writes into buffers does not count
                twin(meta_batch[0])
    assert torch.equal(model.bank, before if fails else twin.bank)
    assert address(model.table) == place
