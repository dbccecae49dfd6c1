"""What a run leaves on disk: config.json when it starts, result.json when it has finished."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from metakern.data import Task
from metakern.trainers.config import TrainConfig
from metakern.trainers.evaluate import Errors


def _write(path: Path, content: dict[str, Any]) -> None:
    # Written beside and renamed: a run killed at this moment leaves no half of a file behind.
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)


def identity(config: TrainConfig, contents: str | None) -> dict[str, Any]:
    """What a result is of: the settings, and of data of the user's own what their files held."""
    return {**config.identity(), **({"contents": contents} if contents else {})}


def start(folder: Path, config: TrainConfig, task: Task) -> None:
    """Make `folder` and write config.json; a result of an earlier run there is no longer one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "failed_batch.pt", "weighting.csv"):
        (folder / name).unlink(missing_ok=True)
    shares = [round(share, 6) for share in task.class_shares.tolist()]
    _write(
        folder / "config.json",
        {
            **asdict(config),
            "task": task.name,
            "class_names": task.class_names,
            "train_examples": len(task.train),
            "class_shares": shares,
            "meta_examples": len(task.meta),
            "test_examples": len(task.test),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    )


def finish(
    folder: Path, identity: dict[str, Any], errors: Errors, seconds: float, steps: int, best_step: int | None = None
) -> None:
    """Write result.json: that it exists says the run is complete."""
    _write(
        folder / "result.json",
        {
            "identity": identity,
            "steps": steps,
            **({} if best_step is None else {"best_step": best_step}),
            "test_error": errors.test,
            "balanced_error": errors.balanced,
            "error_by_class": errors.by_class,
            "roc_area": errors.area,
            "seconds": seconds,
        },
    )


def finished(folder: Path, config: TrainConfig, contents: str | None = None) -> dict[str, Any] | None:
    """The result of a complete run of exactly `config` in `folder`, and of such `contents` where they are known."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    # A result from before an option existed has that option's default.
    known = {**TrainConfig(config.method).identity(), **result["identity"]}
    if contents is None:
        known.pop("contents", None)
    return result if known == identity(config, contents) else None
