"""A grid of runs, each in a folder of its own. Finished runs are not repeated."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from metakern.data import Source, contents
from metakern.methods import METHODS, find
from metakern.methods.method import NotApplicable
from metakern.methods.settings import parse, settings_for
from metakern.trainers.config import TrainConfig
from metakern.trainers.loop import train
from metakern.trainers.run_folder import finished, read_json, write_json
from metakern.trainers.stopping import Stop, Stopped, StopSignals, never
from metakern.trainers.task import make_source, make_task

NAME = "comparison.json"


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: its config, its folder, and its result.json if it is finished."""

    config: TrainConfig
    folder: Path
    result: dict[str, Any] | None


class Ended(NamedTuple):
    """How a cell's run ended: with a result, or why its method does not support the data, or why it failed."""

    folder: Path
    skipped: str | None = None
    failed: str | None = None


class CellsFailed(ValueError):
    """Some runs of a comparison failed; `cells` are all of its cells."""

    def __init__(self, message: str, cells: list[Cell]) -> None:
        super().__init__(message)
        self.cells = cells


def chosen(words: Sequence[str]) -> list[str]:
    """The methods that `words` name, each once; "noise", "imbalance": all methods for these, and baselines.

    Raises: ValueError for a word that is neither of them nor a method, and for no words.
    """
    names: list[str] = []
    for word in words:
        if word in ("noise", "imbalance"):
            names += [method.name for method in METHODS.values() if method.handles in (word, "both", "none")]
        else:
            names.append(find(word).name)
    if not names:
        raise ValueError("--methods does not name any method")
    return list(dict.fromkeys(names))


def grid(
    base: TrainConfig, methods: Sequence[str], majorities: Sequence[float | None], seeds: Sequence[int]
) -> list[TrainConfig]:
    """Every combination. Seeds vary slowest, so that an interrupted comparison has complete tables for the first seeds.

    Settings of methods, `base.set`, apply to the methods that have them.
    Raises: ValueError for unknown methods, and for a setting that none of them has.
    """
    own = {method: settings_for(find(method), base.set) for method in methods}
    for name in parse(base.set):
        if not any(name in parse(text) for text in own.values()):
            raise ValueError(f"--set: none of {', '.join(methods)} has a setting {name!r}")
    return [
        replace(base, method=method, set=own[method], majority=majority, seed=seed)
        for seed in seeds
        for majority in majorities
        for method in methods
    ]


def cell(root: Path, config: TrainConfig, contents: str | None = None) -> Cell:
    """The cell of `config` under `root`, with its result if it has one, and if that is of these `contents`."""
    folder = root / "cells" / config.name()
    return Cell(config, folder, finished(folder, config, contents))


def read_cells(root: Path) -> list[Cell] | None:
    """The cells of the comparison in `root`, finished or not; None if there is no comparison."""
    configs = read_json(root / NAME)
    return None if configs is None else [cell(root, TrainConfig(**config)) for config in configs]


def other_table(root: Path, configs: Sequence[TrainConfig]) -> str | None:
    """What the table of the comparison in `root` has that one of `configs` would not have; None if there is nothing."""
    known = [config.identity() for config in configs]
    finished = [entry.config for entry in read_cells(root) or () if entry.result is not None]
    lost = [config.name() for config in finished if config.identity() not in known]
    return f"holds a comparison with other runs ({', '.join(lost[:4])})" if lost else None


@lru_cache(maxsize=1)
def _source(config: TrainConfig) -> Source:
    """The data set of the comparison, read once per process."""
    return make_source(config)


def _run(base: TrainConfig, config: TrainConfig, folder: Path, stop: Stop) -> Ended:
    if stop():
        raise Stopped("stopped between two runs")
    task = make_task(config, _source(base))
    try:
        train(config, folder, task=task, progress=False, stop=stop)
    except NotApplicable as reason:
        return Ended(folder, skipped=f"{config.method} is skipped: {reason}")
    except Stopped:
        raise
    except (ValueError, OSError) as error:
        return Ended(folder, failed=str(error))
    except Exception:  # a fault of the method, or of ours
        return Ended(folder, failed=traceback.format_exc())
    return Ended(folder)


def _record(root: Path, configs: Sequence[TrainConfig]) -> None:
    """Write the list of cells of a comparison. If a comparison fails before this, the former list remains."""
    root.mkdir(parents=True, exist_ok=True)  # where its methods are left out, no cell has made it
    write_json(root / NAME, [asdict(config) for config in configs])


_stop: Stop = never  # in each process of a comparison: is it, or the one that began it, asked to stop?


def _begin_process(asked: Any) -> None:
    global _stop
    # Ctrl-C reaches every process of a terminal: in these it must end neither the step nor the process.
    own = StopSignals(quiet=True).__enter__()

    def either() -> bool:
        return own() or asked.is_set()

    _stop = either


def _run_in_process(base: TrainConfig, config: TrainConfig, folder: Path) -> Ended:
    return _run(base, config, folder, _stop)


def _ended(cells: Sequence[Cell], jobs: int, stop: Stop) -> Iterator[Ended]:
    """Run `cells` and yield what `_run` returns as they finish."""
    if jobs == 1:
        _source.cache_clear()  # a file may have changed since another comparison
        try:
            yield from (_run(cells[0].config, entry.config, entry.folder, stop) for entry in cells)
        finally:
            _source.cache_clear()
        return
    # Spawned, not forked: a fork copies torch's thread pool in whatever state it is in.
    context = multiprocessing.get_context("spawn")
    asked = context.Event()
    with ProcessPoolExecutor(jobs, context, _begin_process, (asked,)) as pool:
        waiting = {pool.submit(_run_in_process, cells[0].config, entry.config, entry.folder) for entry in cells}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                if stop():
                    asked.set()
                yield from (future.result() for future in done)
        except BaseException as error:
            asked.set()  # the other cells stop as well, and have left their checkpoints once the pool is shut down
            pool.shutdown(wait=True, cancel_futures=True)
            ended = stop() and isinstance(error, BrokenProcessPool)  # by the signal: one did not listen yet
            if isinstance(error, Stopped) or ended:  # at which step depends on which process is first
                raise Stopped("stopped, with a checkpoint of every run in progress") from None
            raise


def run_missing(
    root: Path, configs: Sequence[TrainConfig], *, jobs: int = 1, progress: bool = True, stop: Stop = never
) -> list[Cell]:
    """Run the cells of `configs` without a result, `jobs` at a time, and return all cells.

    If a cell fails, the others are run all the same. Methods that do not support this kind of data are left out, with a
    line that says why. comparison.json lists the cells.
    Raises: ValueError if jobs is below 1; Stopped as `train`, after all running cells have left a checkpoint; at the
    end CellsFailed, if any failed.
    """
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
    found = contents(configs[0].data) if configs else None
    missing = [entry for entry in (cell(root, config, found) for config in configs) if entry.result is None]
    bar = tqdm(total=len(configs), initial=len(configs) - len(missing), unit="run", disable=not progress)
    failed: list[str] = []
    with bar:
        for ended in _ended(missing, jobs, stop):
            if ended.skipped is not None:
                bar.write(ended.skipped, file=sys.stderr)
            if ended.failed is not None:
                failed.append(f"{ended.folder.name}: {ended.failed}")
                bar.write(f"failed: {failed[-1]}", file=sys.stderr)
            else:
                _record(root, configs)
            bar.set_postfix_str(ended.folder.name, refresh=False)
            bar.update()
    if configs and not missing:
        _record(root, configs)
    cells = [cell(root, config, found) for config in configs]
    if failed:
        reasons = "\n".join(failed)
        raise CellsFailed(
            f"{len(failed)} of {len(configs)} runs failed; the same command repeats them\n{reasons}", cells
        )
    return cells
