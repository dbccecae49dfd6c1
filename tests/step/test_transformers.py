"""Models of the transformers library, unmodified, from configuration: exact by the cheap engine, in train mode too."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

import metakern
from metakern.testing import budget

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"num_labels": 3, "vocab_size": 50}
BERT = {
    **SMALL,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", BERT, "classes"),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", BERT, "masked"),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**SMALL, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
        "tokens",
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**BERT, "num_key_value_heads": 1}, "tokens"),
    "llama-classifier": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**BERT, "num_key_value_heads": 1},
        "classes",
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**BERT, "pooler_hidden_size": 16},
        "classes",
    ),
    "convbert": ("ConvBertForSequenceClassification", "ConvBertConfig", {**BERT, "embedding_size": 16}, "classes"),
    "yoso": ("YosoForSequenceClassification", "YosoConfig", {**BERT, "num_hash": 2}, "classes"),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**{k: v for k, v in BERT.items() if "vocab" not in k}, "image_size": 16, "patch_size": 4},
        "images",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 50,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        "masked",
    ),
}


def batch_of(kind: str, rows: int) -> dict[str, Tensor]:
    if kind == "images":
        return {"pixel_values": torch.randn(rows, 3, 16, 16).double(), "labels": torch.randint(0, 3, (rows,))}
    tokens = torch.randint(3, 50, (rows, 7))
    if kind == "classes":
        lengths = torch.randint(3, 8, (rows, 1))
        return {
            "input_ids": tokens,
            "attention_mask": (torch.arange(7) < lengths).long(),
            "labels": torch.randint(0, 3, (rows,)),
        }
    labels = tokens.clone()
    labels[:, :2] = -100
    labels[0, :4] = -100
    return {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_in_train_mode(name: str, memory: str) -> None:
    """Against double backward with the same dropout masks. Some of these models compute in float32 inside."""
    architecture, config, settings, kind = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**settings)).double().train()
    batch, meta_batch = batch_of(kind, 5), batch_of(kind, 3)
    activations = list(OrderedDict.items(transformers.activations.ACT2FN))  # a global table that some models ask

    def step(engine: str) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        result = metakern.reweight_step(model, batch, meta_batch, engine=engine, memory=memory, rule="softmax")
        assert engine != "auto" or result.engine == "ghost"
        return result.dots, torch.cat([p.grad.flatten() for p in model.parameters()])

    dots, gradient = step("auto")
    want_dots, want_gradient = step("double_backward")
    budget.assert_within(dots, want_dots, want_dots.abs().max(), terms=1000, dtype=torch.float32)
    budget.assert_within(gradient, want_gradient, want_gradient.abs().max(), terms=1000, dtype=torch.float32)
    assert list(OrderedDict.items(transformers.activations.ACT2FN)) == activations
