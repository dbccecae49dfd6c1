"""Pretrained encoders from a local folder, by the transformers package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "transformers:"


def folder_of(model: str | None) -> Path | None:
    """The folder that `--model transformers:DIR` names, else None.

    Raises: ValueError when it is not there.
    """
    if model is None or not model.startswith(PREFIX):
        return None
    folder = Path(model[len(PREFIX) :]).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {model}: {str(folder)!r} holds no config.json of a transformers model")
    return folder


def tokenizer(folder: Path, *, length: int = 64) -> Callable[[list[str]], Tensor]:
    """texts -> tokens[n, length] int64 by the folder's own tokenizer, cut off and padded; nothing is downloaded."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(texts: list[str]) -> Tensor:
        found = loaded(texts, padding="max_length", truncation=True, max_length=length)
        return torch.tensor(found["input_ids"], dtype=torch.int64)

    return encode


class Encoder(nn.Module):
    """tokens[n, t] int64 -> logits[n, C] by the folder's encoder under a classification head of C outputs.

    The padding token of its config is masked.
    """

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        self.model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=classes, local_files_only=True
        )
        padding = self.model.config.pad_token_id
        self.padding = -1 if padding is None else int(padding)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, attention_mask=(tokens != self.padding).long()).logits
