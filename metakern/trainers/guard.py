"""Failing steps: the run stops, and the input of the step is saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from metakern.methods import Outcome, finite
from metakern.methods.method import Batch

NAME = "failed_batch.pt"


def require_finite(outcome: Outcome) -> None:
    """Raise ValueError if a loss or a weight of `outcome` is not finite."""
    finite.require_finite("loss", outcome.losses)
    finite.require_finite("weight", outcome.weights)


def save_failure(
    folder: Path, error: Exception, step: int, rows: Tensor, batch: Batch, meta_batch: Batch, model: nn.Module
) -> Path:
    """Write failed_batch.pt: the step, the rows of the batch in the training set, both batches and the model.

    The model is as the failed step left it: unchanged if the step itself raised the error.
    """
    path = folder / NAME
    torch.save(
        {
            "error": str(error),
            "step": step,
            "rows": rows,
            "batch": batch,
            "meta_batch": meta_batch,
            "model": model.state_dict(),
        },
        path,
    )
    return path
