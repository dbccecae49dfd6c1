"""What tests of tier gpu rely on, of a real GPU and of the emulated one: values of the CPU, and what a GPU rejects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from metakern.testing import budget, inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_cudnn")]


def test_tensors_of_two_devices_do_not_mix() -> None:
    x = torch.ones(3, 3, device="cuda")
    for call in (lambda: x + torch.ones(3), lambda: x @ torch.ones(3, 3), lambda: F.embedding(torch.tensor([1]), x)):
        with pytest.raises(RuntimeError, match="same device"):
            call()
    assert (x + torch.tensor(1.0)).device == x[torch.tensor([1])].device == x.device


@pytest.mark.parametrize(
    "wait", [Tensor.item, Tensor.nonzero, Tensor.cpu, lambda x: x[x > 0], lambda x: x.copy_(torch.ones(3))]
)
def test_waiting_is_noticed(wait: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device="cuda")
    x = x[0] if wait is Tensor.item else x
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            wait(x)
        x.mul_(2)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_graph_does_nothing_until_it_is_replayed() -> None:
    x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += x
        y = 2 * total
    assert total.sum().item() == 0
    for k in (1, 2):
        graph.replay()
        assert y.tolist() == [2.0 * k] * 3
    x.fill_(10)
    graph.replay()
    assert y.tolist() == [24.0] * 3


def test_the_random_state_is_one_of_the_device() -> None:
    before, there = torch.get_rng_state(), torch.cuda.get_rng_state()
    x = torch.rand(5, device="cuda")
    assert torch.equal(torch.get_rng_state(), before)
    torch.cuda.set_rng_state(there)
    assert torch.equal(torch.rand(5, device="cuda"), x)
    assert not torch.equal(torch.rand(5, device="cuda"), x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.bias = nn.Linear(4, 24), nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(len(x), -1, -1, -1))


MODELS = {
    "attention": Attention,
    "BatchNorm": lambda: nn.Sequential(nn.Conv1d(5, 3, 2), nn.BatchNorm1d(3)),
    "LSTM": lambda: nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True),
    "GRU": lambda: nn.GRU(4, 3, 2, batch_first=True),
    "RNN": lambda: nn.RNN(4, 3, nonlinearity="relu"),
    "depthwise": lambda: nn.Conv1d(5, 10, 3, groups=5),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_have_the_values_and_gradients_of_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), inputs.normal(6, 5, 4, dtype=torch.float32)

    def values() -> list[Tensor]:
        outputs = tree_leaves(model(x.to(next(model.parameters()).device)))
        weights = [inputs.normal(*y.shape, seed=k, dtype=y.dtype).to(y) for k, y in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, list(model.parameters()), weights)
        return [t.detach().cpu() for t in (*outputs, *grads)]

    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        want = values()
        model = model.cuda()
        found = values()
    for got, expected in zip(found, want, strict=True):
        budget.assert_within(got, expected, expected.abs().max().item() + 1, terms=1000)
