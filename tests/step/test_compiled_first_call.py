"""Compiled steps of models that note on their first call what they were called with, as transformers do."""

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step


class Notes(nn.Module):
    """Notes on its first call what it was called with, as transformers' classifiers do, or counts its calls."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.head, self.counts, self.noted = nn.Linear(4, 3), counts, None

    def forward(self, x: Tensor) -> Tensor:
        self.noted = (self.noted or 0) + 1 if self.counts else "noted"
        return self.head(x)


def test_what_is_noted_once_stays_noted() -> None:
    setup = Setup(Notes(counts=False).double(), *inputs.pair(6, 3, 4, classes=3))
    program = metakern.compile_step(setup.model, setup.batch, setup.meta_batch, backend="eager")
    assert setup.model.noted == "noted"
    judge_step(lambda model, batch, meta_batch, loss_fn: program(batch, meta_batch), setup)


def test_what_is_counted_is_refused() -> None:
    setup = Setup(Notes(counts=True).double(), *inputs.pair(6, 3, 4, classes=3))
    with pytest.raises(NotImplementedError, match="counts or keeps something else"):
        metakern.compile_step(setup.model, setup.batch, setup.meta_batch, backend="eager")
    assert setup.model.noted is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_classifier_of_transformers(attention: str) -> None:
    """Its reshapes are other views where they are watched, and are the same calls."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    config = transformers.BertConfig(**sizes, intermediate_size=24, max_position_embeddings=8)
    config._attn_implementation = attention
    model = transformers.BertForSequenceClassification(config).double().eval()
    batch, meta_batch = (
        {
            "input_ids": inputs.labels(n, 6, classes=30, seed=n),
            "attention_mask": torch.ones(n, 6, dtype=torch.int64),
            "labels": inputs.labels(n, classes=3, seed=1),
        }
        for n in (4, 3)
    )
    setup = Setup(model, batch, meta_batch)
    program = metakern.compile_step(setup.model, setup.batch, setup.meta_batch, backend="eager")
    result = judge_step(lambda model, batch, meta_batch, loss_fn: program(batch, meta_batch), setup).result
    assert result.engine == "ghost"
