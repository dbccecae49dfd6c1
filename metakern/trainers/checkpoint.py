"""Checkpoints: all that a run must remember to go on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from metakern.trainers.config import TrainConfig

_NAME = "checkpoint.pt"


def save_checkpoint(folder: Path, config: TrainConfig, state: dict[str, Any]) -> None:
    """Write `state` into `folder`; killed half-way, this leaves the checkpoint from before."""
    draft = folder / (_NAME + ".draft")
    torch.save({"identity": config.identity(), "state": state}, draft)
    draft.replace(folder / _NAME)


def load_checkpoint(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """The state of an unfinished run of exactly `config` in `folder`, else None."""
    path = folder / _NAME
    if not path.is_file():
        return None
    stored = torch.load(path, map_location="cpu", weights_only=True)
    return stored["state"] if stored["identity"] == config.identity() else None


def drop_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a run that is complete, or of another run."""
    (folder / _NAME).unlink(missing_ok=True)


def random_states() -> dict[str, Any]:
    """The states of torch's global generators."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set torch's global generators to `states`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
