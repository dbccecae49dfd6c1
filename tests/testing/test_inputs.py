"""Seeded inputs are what they say."""

import torch

from metakern.testing import inputs


def test_seeds_decide_and_nothing_else() -> None:
    torch.manual_seed(0)
    first = inputs.normal(3, 4, seed=5)
    torch.manual_seed(1)
    assert torch.equal(first, inputs.normal(3, 4, seed=5))
    assert not torch.equal(first, inputs.normal(3, 4, seed=6))
    assert torch.equal(first.float(), inputs.normal(3, 4, seed=5, dtype=torch.float32))


def test_layouts_keep_values() -> None:
    tensor = inputs.normal(2, 3, 4, 5)
    for layout in (inputs.non_contiguous, inputs.transposed, inputs.channels_last):
        other = layout(tensor)
        assert torch.equal(other, tensor)
        assert not other.is_contiguous()
    assert inputs.channels_last(tensor).is_contiguous(memory_format=torch.channels_last)
    indices = inputs.labels(6, classes=4)
    assert torch.equal(inputs.non_contiguous(indices), indices)
