import pytest
import torch
from torch import nn

from metakern.data import Examples, Task
from metakern.methods import Setup


@pytest.fixture
def setup():
    """A function that makes the setup of a run of ten steps for a model, on a made-up task unless one is given."""

    def make(model: nn.Module, *, task: Task | None = None, seed: int = 0, lr: float = 0.1, **given) -> Setup:
        return Setup(
            **{
                "task": task or made_up(),
                "model": model,
                "seed": seed,
                "steps": 10,
                "batch_size": 12,
                "make_optimizer": lambda model: torch.optim.SGD(model.parameters(), lr),
                **given,
            }
        )

    return make


def made_up() -> Task:
    """36 training, 6 meta and 12 test examples of 6 numbers in two classes; a quarter of the labels are flipped."""
    generator = torch.Generator().manual_seed(9)

    def examples(n: int, first: int) -> Examples:
        inputs = torch.randn(n, 6, generator=generator, dtype=torch.float64)
        return Examples(inputs, (inputs[:, 0] > 0).long(), torch.arange(first, first + n))

    clean, meta, test = examples(36, 0), examples(6, 36), examples(12, 42)
    flipped = torch.where(torch.arange(36) % 4 == 0, 1 - clean.targets, clean.targets)
    train = Examples(clean.inputs, flipped, clean.ids)
    return Task("made-up", train, meta, test, ("a", "b"), clean.targets)
