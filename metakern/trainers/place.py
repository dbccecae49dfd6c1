"""Where a command writes: never over results with other settings, unless --overwrite is given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from metakern.trainers.checkpoint import stored_identity
from metakern.trainers.claim import claimed
from metakern.trainers.config import TrainConfig
from metakern.trainers.run_folder import RESULTS, differing, identity, read_json

Held = Callable[[Path], str | None]  # what a folder holds that would be lost, in words


_IN_USE = "is in use by another command"


@contextmanager
def place(out: Path | None, default: Path, held: Held, *, overwrite: bool = False) -> Iterator[Path]:
    """`out`, or the first of `default`, default-2, default-3 ... in which nothing would be lost.

    Inside the block it is this command's alone.
    Raises: ValueError if something would be lost in `out`, unless `overwrite`, or if another command writes to it.
    """
    if out is not None or overwrite:
        folder = out or default
        with claimed(folder) as alone:
            if not alone:
                raise ValueError(f"{folder} {_IN_USE}; wait for it, or name another folder with --out")
            if not overwrite and (reason := held(folder)) is not None:
                raise ValueError(f"{folder} {reason}; name another folder with --out, or replace it with --overwrite")
            yield folder
        return
    reasons: list[str] = []
    for folder in chain([default], (default.with_name(f"{default.name}-{k}") for k in count(2))):
        with claimed(folder) as alone:
            reason = held(folder) if alone else _IN_USE
            if reason is None:
                if reasons:
                    print(f"metakern: {default} {reasons[0]}; writing to {folder} instead", file=sys.stderr)
                yield folder
                return
            reasons.append(reason)


def other_run(folder: Path, config: TrainConfig, contents: str | None) -> str | None:
    """How the run in `folder` differs, if it is finished or resumable and not of `config` and these `contents`."""
    result = read_json(folder / "result.json")
    stored = stored_identity(folder) if result is None else result["identity"]
    if stored is None:
        return _of_somebody_else(folder)
    kind = "an unfinished" if result is None else "a finished"
    return difference(kind + " run", stored, identity(config, contents))


def _of_somebody_else(folder: Path) -> str | None:
    """What a run would write over in a folder that no run has begun; None if there is nothing."""
    if (folder / "config.json").exists():
        return None
    found = [name for name in RESULTS if (folder / name).exists()]
    return f"holds files that are not those of a run ({', '.join(found[:4])})" if found else None


def other_cell(folders: Sequence[Path], configs: Sequence[TrainConfig], contents: str | None) -> str | None:
    """The same for the first of `folders` whose run is not that of its entry in `configs`; None if there is none."""
    found = (other_run(folder, config, contents) for folder, config in zip(folders, configs, strict=True))
    return next((run for run in found if run is not None), None)


def difference(kind: str, stored: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Which settings of a result of this `kind` differ, in words; None if none does."""
    names = differing(stored, wanted)
    shown = [_told(name, stored.get(name), wanted.get(name)) for name in names[:4]]
    shown += [f"{len(names) - 4} more"] if len(names) > 4 else []
    return f"holds {kind} with other settings ({'; '.join(shown)})" if names else None


def _told(name: str, stored: Any, wanted: Any) -> str:
    if name == "contents":
        return "files have changed since"
    before, now = ("not given" if value in (None, "") else str(value) for value in (stored, wanted))
    return f"{'method' if name == 'method' else '--' + name.replace('_', '-')} {before}, now {now}"
