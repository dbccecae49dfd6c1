"""`python -m benchmarks.gpu`: everything that is measured on a GPU, in one command and under eight minutes.

Rows go to $OUT where that is set (a folder), else to benchmarks/results/. Without a GPU it runs the same code at small
sizes, to show that the command is ready; those rows are printed and never kept.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import CPU_CASES, Case
from benchmarks.compare import compare, table
from benchmarks.gpu_ops import measure_ops
from benchmarks.rows import RESULTS, Row, append
from metakern.testing import models

MINUTES = 7.5
SHARE_OF_OPERATORS = 0.25


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


def _encoder(width: int, depth: int, heads: int, vocabulary: int) -> Callable[[], nn.Module]:
    return lambda: models.Transformer(width, depth, heads, classes=10, vocabulary=vocabulary, fused=True)


def _sizes(small: bool) -> list[Case]:
    """The shapes of real models; the small ones have the same layers and fit any machine."""
    if small:
        return [
            Case("bert-base-64-8", _encoder(32, 2, 4, 50), (8,), 8, 2, vocabulary=50, fused=True),
            Case("vit-s-64-8", lambda: VisionTransformer(32, 2, 4, 8, 16, 10), (3, 16, 16), 8, 2, fused=True),
            Case(
                "llama-130m-12-2",
                lambda: LanguageModel(50, 32, 2, 4, 48),
                *((16,), 4, 2, 50),
                vocabulary=50,
                targets=(16,),
                fused=True,
                dtype=torch.bfloat16,
            ),
        ]
    return [
        Case("mlp-4096-1024-32", lambda: models.mlp(4096), (4096,), 1024, 32),
        Case("bert-base-64-8", _encoder(768, 12, 12, 30522), (128,), 64, 8, vocabulary=30522, fused=True),
        Case("bert-base-32-8", _encoder(768, 12, 12, 30522), (128,), 32, 8, vocabulary=30522, fused=True),
        Case(
            "vit-s-64-8", lambda: VisionTransformer(384, 12, 6, 16, 224, 1000), (3, 224, 224), 64, 8, 1000, fused=True
        ),
        Case(
            "llama-130m-12-2",
            lambda: LanguageModel(32000, 768, 12, 12, 2048),
            *((4096,), 12, 2, 32000),
            vocabulary=32000,
            targets=(4096,),
            fused=True,
            dtype=torch.bfloat16,
        ),
    ]


def _small(case: Case) -> Case:
    """A case of the CPU suite with few examples, for the dry run."""
    return replace(case, n=8, m=2)


def measure(device: str, cases: list[Case], minutes: float) -> list[Row]:
    """All cases that the time allows; one that fails or comes too late gets a row that says so."""
    deadline = time.perf_counter() + 60 * minutes
    rows: list[Row] = []
    for place, case in enumerate(cases):
        left = deadline - time.perf_counter()
        dtype = str(case.dtype).removeprefix("torch.")
        if left < 10:
            rows.append(Row(case.name, case.shapes, dtype, "all", "not measured: out of time"))
            continue
        try:
            rows += compare(case, device=device, seconds=min(10.0, left / (len(cases) - place) / 3))
        except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
            rows.append(Row(case.name, case.shapes, dtype, "all", f"not measured: {str(error).splitlines()[0][:160]}"))
        if device == "cuda":
            torch.cuda.empty_cache()
        print(table([row for row in rows if row.case == case.name]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="operators on a GPU, and re-weighted steps in plain steps")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", default="", help="measure the operators and cases whose name contains this")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = device == "cpu"
    start = time.perf_counter()
    operators = measure_ops(device, SHARE_OF_OPERATORS * options.minutes, options.only)
    cases = [*_sizes(small), *(map(_small, CPU_CASES) if small else CPU_CASES)]
    left = options.minutes - (time.perf_counter() - start) / 60
    rows = measure(device, [case for case in cases if options.only in case.name], left)
    if small:
        print("no GPU here: a dry run at small sizes, nothing is kept; on a GPU these rows are not measured yet")
    else:
        folder = Path(os.environ.get("OUT", RESULTS))
        for suite, found in (("ops", operators), ("steps", rows)):
            if found:
                print("rows in", append(found, device, suite, folder))


if __name__ == "__main__":
    main()
