"""Checkpoints: everything that a run needs to resume as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from metakern.trainers.run_folder import differing

_NAME = "checkpoint.pt"


def save_state(state: Any, path: Path) -> None:
    """`torch.save`, but with an OSError that names `path` if it cannot be written."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written; is the disk full? ({str(error).splitlines()[0]})") from error


def save_checkpoint(folder: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write `state` into `folder`; if interrupted, the previous checkpoint remains."""
    draft = folder / (_NAME + ".draft")
    save_state({"identity": identity, "state": state}, draft)
    draft.replace(folder / _NAME)


def load_checkpoint(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state of an unfinished run with that `run_folder.identity` in `folder`, else None."""
    stored = _read(folder)
    return stored["state"] if stored and not differing(stored["identity"], identity) else None


def stored_identity(folder: Path) -> dict[str, Any] | None:
    """The `run_folder.identity` of the unfinished run in `folder` that can be resumed; None if there is none."""
    stored = _read(folder)
    return stored["identity"] if stored else None


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / _NAME
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever kind the damage leads to
        raise ValueError(f"{path} cannot be read; remove it to begin the run anew ({error!r:.200})") from error


def drop_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a finished run, or of another run."""
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
