"""The shapes of real models, which need a GPU, each with a small sibling of the same layers that fits any machine."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.real_models import LanguageModel, VisionTransformer, bert, gpt2
from metakern.testing import models
from metakern.testing.networks import Norm, resnet, wide_resnet

Build = Callable[[], nn.Module]

SMALL_BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
SMALL_GPT = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)


def real_cases(small: bool) -> list[Case]:
    """All real cases at full size, or their siblings under the same names."""
    return [pair[small] for pair in _pairs()]


def _pairs() -> list[tuple[Case, Case]]:
    return [
        _pair(Case("mlp-4096-1024-32", partial(models.mlp, 4096), (4096,), 1024, 32), partial(models.mlp, 16), (16,)),
        *(
            _residual(f"resnet-32-{name}-{n}-{m}", partial(resnet, 32, norm=norm), partial(resnet, 8, 4, norm=small))
            for n, m in ((100, 100), (128, 16))
            for name, norm, small in (("gn", _groups(4), _groups(2)), ("bn", nn.BatchNorm2d, nn.BatchNorm2d))
        ),
        _residual("wrn-28-10-128-16", partial(wide_resnet, 28, 10), partial(wide_resnet, 10, 1)),
        _pair(
            Case(
                "vit-s-64-8",
                lambda: VisionTransformer(384, 12, 6, 16, 224, 1000),
                *((3, 224, 224), 64, 8, 1000),
                fused=True,
            ),
            lambda: VisionTransformer(32, 2, 4, 8, 16, 10),
            (3, 16, 16),
            classes=10,
        ),
        *(_bert(n, m) for n, m in ((64, 8), (32, 8), (30, 30))),
        _language(Case("gpt2-124m-16-2", gpt2, (1024,), 16, 2, 50257, fused=True), partial(gpt2, **SMALL_GPT)),
        _language(
            Case("llama-130m-12-2", _llama, (4096,), 12, 2, 32000, fused=True, dtype=torch.bfloat16),
            lambda: LanguageModel(50, 32, 2, 4, 48),
        ),
    ]


def _pair(case: Case, build: Build, shape: tuple[int, ...], **changes: object) -> tuple[Case, Case]:
    return case, replace(case, build=build, shape=shape, n=8, m=2, **changes)


def _residual(name: str, build: Build, small: Build) -> tuple[Case, Case]:
    n, m = map(int, name.split("-")[-2:])
    coupled = "gn" not in name
    return _pair(Case(name, build, (3, 32, 32), n, m, interacting=coupled), small, (3, 16, 16))


def _groups(count: int) -> Norm:
    return lambda channels: nn.GroupNorm(count, channels)


def _bert(n: int, m: int) -> tuple[Case, Case]:
    case = Case(f"bert-base-{n}-{m}", bert, (128,), n, m, vocabulary=30522, fused=True)
    return _pair(case, partial(bert, **SMALL_BERT), (8,), vocabulary=50)


def _llama() -> nn.Module:
    return LanguageModel(32000, 768, 12, 12, 2048)


def _language(case: Case, small: Build) -> tuple[Case, Case]:
    """A loss per example that is the mean over its positions; as many classes as tokens."""
    case = replace(case, vocabulary=case.classes, targets=case.shape)
    return _pair(case, small, (16,), targets=(16,), classes=50, vocabulary=50)
