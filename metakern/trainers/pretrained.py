"""Pretrained encoders from a local folder, by means of the transformers package."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "transformers:"


def folder_of(model: str | None) -> Path | None:
    """The folder that `--model transformers:DIR` names, else None.

    Raises: ValueError if it does not exist.
    """
    if model is None or not model.startswith(PREFIX):
        return None
    folder = Path(model[len(PREFIX) :]).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {model}: {str(folder)!r} holds no config.json of a transformers model")
    return folder


def tokenizer(folder: Path, *, length: int = 64) -> Callable[[list[str]], Tensor]:
    """texts -> tokens[n, length] int64 by the folder's own tokenizer, truncated and padded; nothing is downloaded.

    Raises: ValueError if the folder has none.
    """
    from transformers import AutoTokenizer

    loaded = _read(AutoTokenizer, folder)
    if len(loaded) <= len(loaded.all_special_ids):  # transformers makes one up where the files are missing
        raise ValueError(f"--model {PREFIX}{folder}: there is no tokenizer vocabulary")

    def encode(texts: list[str]) -> Tensor:
        found = loaded(texts, padding="max_length", truncation=True, max_length=length)
        return torch.tensor(found["input_ids"], dtype=torch.int64)

    return encode


def _read(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder)`, without network access.

    Raises: ValueError if the folder lacks the files.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"--model {PREFIX}{folder}: {said}") from error


def _require_only_the_head(folder: Path, mismatched: Any, encoder: str, classes: int) -> None:
    """Warn if the head is new because its size differs; raise ValueError if any other layer does not fit the config."""
    names = sorted(name for name, *_ in mismatched)
    inner = [name for name in names if name.startswith(encoder + ".")]
    if inner:
        raise ValueError(f"--model {PREFIX}{folder}: sizes of {', '.join(inner)} differ from its config.json")
    if names:
        warnings.warn(
            f"{folder}: its classification head is for another number of classes; {', '.join(names)} are initialised "
            f"anew, for {classes} classes",
            stacklevel=3,
        )


class Encoder(nn.Module):
    """tokens[n, t] int64 -> logits[n, C] by the folder's encoder with a classification head of C outputs.

    The padding token of its config is masked. A stored head for another number of classes is replaced by a new one,
    with a warning, as if none were stored.
    Raises: ValueError if the folder has no weights, or if they do not fit its config.
    """

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        self.model, found = _read(
            AutoModelForSequenceClassification,
            folder,
            num_labels=classes,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        _require_only_the_head(folder, found["mismatched_keys"], self.model.base_model_prefix, classes)
        padding = self.model.config.pad_token_id
        self.padding = -1 if padding is None else int(padding)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, attention_mask=(tokens != self.padding).long()).logits


def with_unused_frozen(encoder: Encoder, tokens: Tensor) -> Encoder:
    """The encoder, without training what the logits of `tokens` do not depend on: poolers, layers for other tasks."""
    trainable = [p for p in encoder.parameters() if p.requires_grad]
    found = torch.autograd.grad(encoder(tokens).sum(), trainable, allow_unused=True)
    for p, grad in zip(trainable, found, strict=True):
        p.requires_grad_(grad is not None)
    return encoder
