"""The files of a run: config.json when it starts, result.json when it is finished."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from metakern import __version__
from metakern.data import Task
from metakern.trainers.config import TrainConfig
from metakern.trainers.evaluate import Errors

# What a finished run leaves, result.json first: that it exists says that the others belong to it.
RESULTS = (
    *("result.json", "report.html", "model.pt", "weights.csv", "weights.npz"),
    *("weighting.csv", "corrected.csv", "failed_batch.pt"),
)


def write_json(path: Path, content: Any) -> None:
    """Write `content`, nan as null; if the run is killed meanwhile, no partial file remains."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(_without_nan(content), indent=2) + "\n")
    draft.replace(path)


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if content != content else content


def read_json(path: Path) -> Any:
    """The content of the file; None if there is none.

    Raises: ValueError naming the file if it is not JSON.
    """
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read; remove it to begin anew ({error})") from error


def read_result(folder: Path) -> dict[str, Any]:
    """The content of result.json, with nan for what could not be measured.

    Raises: FileNotFoundError if the run is not finished.
    """
    result = read_json(folder / "result.json")
    if result is None:
        raise FileNotFoundError(f"{folder} holds no finished run: result.json is missing")
    by_class = [math.nan if error is None else error for error in result["error_by_class"]]
    measured = {name: math.nan if value is None else value for name, value in result.items()}
    return {**measured, "error_by_class": by_class}


def identity(config: TrainConfig, contents: str | None) -> dict[str, Any]:
    """What identifies a result: the settings, and for the user's own data the digest of their files."""
    return {**config.identity(), **({"contents": contents} if contents else {})}


def start(folder: Path, config: TrainConfig, task: Task) -> None:
    """Create `folder` and write config.json; files of an earlier run there are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
    shares = [round(share, 6) for share in task.class_shares.tolist()]
    write_json(
        folder / "config.json",
        {
            **asdict(config),
            "task": task.name,
            "class_names": task.class_names,
            "train_examples": len(task.train),
            "class_shares": shares,
            "meta_examples": len(task.meta),
            "certain_meta": task.certain_meta,
            "test_examples": len(task.test),
            "metakern": __version__,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    )


def finish(
    folder: Path, identity: dict[str, Any], errors: Errors, seconds: float, steps: int, best_step: int | None = None
) -> None:
    """Write result.json, whose existence says that the run is finished."""
    write_json(
        folder / "result.json",
        {
            "identity": identity,
            "steps": steps,
            **({} if best_step is None else {"best_step": best_step}),
            "test_error": errors.test,
            "balanced_error": errors.balanced,
            "error_by_class": errors.by_class,
            "roc_area": errors.area,
            "macro_f1": errors.macro_f1,
            "seconds": seconds,
        },
    )


def differing(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The names of the settings in which a stored `identity` differs from the `wanted` one.

    Options that did not exist at the time have their default. Files that no longer exist count as unchanged.
    """
    stored = {**TrainConfig(stored["method"]).identity(), **stored}
    names = [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]
    return [name for name in names if name != "contents" or name in wanted]


def finished(folder: Path, config: TrainConfig, contents: str | None = None) -> dict[str, Any] | None:
    """The result of a finished run of exactly `config` in `folder`, and of these `contents` if they are known."""
    stored = read_json(folder / "result.json")
    if stored is None or differing(stored["identity"], identity(config, contents)):
        return None
    return read_result(folder)


def errors_of(result: dict[str, Any]) -> Errors:
    """The final errors in a result.json."""
    area, f1 = (result.get(name, math.nan) for name in ("roc_area", "macro_f1"))
    return Errors(result["test_error"], result["balanced_error"], result["error_by_class"], area, f1)


def meta_note(config: dict[str, Any]) -> str | None:
    """A note if, by config.json, the meta set was drawn from the user's own data: nobody vouches for its labels."""
    if config.get("certain_meta", True):
        return None
    what, way, test = "rows", "with split=meta", "split=test"
    if config["data"].startswith("images:"):
        what, way, test = "images", "by a folder meta beside train", "a folder test"
    drawn = f"no {what} are marked as meta: {config['meta_examples']} were drawn, with the labels they have"
    return f"{drawn}; mark trusted ones {way} (test examples: {test})"
