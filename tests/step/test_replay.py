"""Calls that are made again: random ones must see the same mask, and constants that data was written into are data."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.oracle import oracle


class BiasedAttention(nn.Module):
    """A learned attention bias, with dropout inside the attention call: a random call with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(5, 5))
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mix(x)
        hidden = F.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=self.bias, dropout_p=0.3)
        return self.head(hidden.mean(1))


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("engine", ["ghost", "jvp"])
def test_random_calls_with_a_parameter_see_one_mask(engine: str, memory: str) -> None:
    torch.manual_seed(0)
    model = BiasedAttention().double()
    batch, meta_batch = inputs.pair(6, 4, 5, 4, classes=3)

    def dots(engine: str, memory: str) -> Tensor:
        torch.manual_seed(1)
        return metakern.grad_dots(model, batch, meta_batch, engine=engine, memory=memory).dots

    want = dots("double_backward", "reuse")
    budget.assert_within(dots(engine, memory), want, want.abs().max(), terms=1000)


class Shifted(nn.Module):
    """Writes tokens into a tensor of zeros, as encoder-decoder models do to shift their labels."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        shifted = tokens.new_zeros(tokens.shape)
        shifted[:, 1:] = tokens[:, :-1]
        return self.head(torch.tanh(self.table(shifted)).mean(1))


def test_constants_become_data_when_data_is_written() -> None:
    torch.manual_seed(0)
    model = Shifted().double()
    batch = torch.randint(8, (6, 5)), torch.randint(3, (6,))
    meta_batch = torch.randint(8, (4, 5)), torch.randint(3, (4,))
    found = metakern.grad_dots(model, batch, meta_batch, engine="ghost")
    budget.assert_dots(found.dots, oracle(model, batch, meta_batch))
