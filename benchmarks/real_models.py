"""Models of the sizes that people train, without dependencies; those of transformers are made from a configuration."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.testing import models


class GatedBlock(nn.Module):
    """A Llama-like block: RMSNorm, causal fused attention without biases, SwiGLU."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden = self.norm2(x)
        return x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class LanguageModel(nn.Module):
    """Embedding, gated blocks, and a head over the vocabulary; logits as cross entropy takes them, [n, C, t]."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(GatedBlock(width, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens)))).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Patches, class token, positions, pre-norm blocks with fused attention."""

    def __init__(self, width: int, depth: int, heads: int, patch: int, side: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(models.Block(width, heads, fused=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Logits(nn.Module):
    """A model of transformers as a function from tokens to logits: [n, C], or [n, C, t] of a language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens).logits
        return logits.transpose(1, 2) if logits.dim() == 3 else logits


def bert(**sizes: int) -> nn.Module:
    """BERT with a classification head, random weights, no dropout; the sizes that are not given are BERT-base's."""
    from transformers import BertConfig, BertForSequenceClassification

    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return Logits(BertForSequenceClassification(BertConfig(num_labels=10, **off, **sizes)))


def gpt2(**sizes: int) -> nn.Module:
    """GPT-2 language model, random weights, no dropout; the sizes that are not given are those of the 124M model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return Logits(GPT2LMHeadModel(GPT2Config(use_cache=False, **off, **sizes)))
