"""`metakern episodes`: few-shot learners with remedies for imbalance, tested on the same episodes of each shape."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from metakern import __version__
from metakern.data import Source, load
from metakern.data.episodes import ClassSplit, split_classes
from metakern.data.shots import SHOT_SHAPES
from metakern.trainers.episode_config import EpisodeConfig
from metakern.trainers.few_shot import Learner, Scores, episodes, fit, half_interval, judge
from metakern.trainers.leaderboard import aligned
from metakern.trainers.pretrained import folder_of, tokenizer
from metakern.trainers.task import usable_device

FIRST_TEST_SEED = 1000  # of the episodes of the first shape


def run_episodes(config: EpisodeConfig, folder: Path, *, progress: bool = True) -> str:
    """Train and test each learner with each balance; episodes.csv and episodes.json in `folder`; the text to print.

    Raises: ValueError if the data set has too few classes with enough examples, and if a learner diverges; as `load`.
    """
    torch.set_num_threads(config.threads)
    usable_device(config.device)
    encoder = folder_of(config.model)
    encode = None if encoder is None else tokenizer(encoder)
    source = load(config.data, config.data_dir, encode=encode, label=config.label, leave_out=config.leave_out)
    split = _split(source, config)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in config.words("learners"):
        plain: dict[str, Scores] = {}
        for balance in config.words("balances"):
            try:
                started = time.perf_counter()
                learner = Learner(name, balance, config, split.train)
                fit(learner, split, config, progress=progress)
                seconds = time.perf_counter() - started
                scores = {shape: _tested(learner, split, shape, config) for shape in config.words("shapes")}
            except ValueError as error:
                raise ValueError(f"{name} with balance {balance!r}: {error}") from error
            plain = plain or scores
            rows += [_row(name, balance, shape, scores[shape], plain[shape], seconds) for shape in scores]
            _save(rows, config, source, split, folder)
    return "\n".join(
        [_table(rows, config), f"table:  {folder / 'episodes.csv'}", f"record: {folder / 'episodes.json'}"]
    )


def _split(source: Source, config: EpisodeConfig) -> ClassSplit:
    """Disjoint pools of classes, each class large enough for any episode.

    Raises: ValueError if a pool has fewer classes than an episode.
    """
    needed = config.most + config.queries
    split = split_classes(source, smallest=needed, held_out=config.held_out, seed=config.seed)
    found = [len(pool.classes) for pool in split]
    if min(found) < config.way:
        raise ValueError(
            f"--way {config.way} needs more classes than there are: of {config.data}, {found[0]} for training, "
            f"{found[1]} for validation and {found[2]} for testing have the {needed} examples that --most and "
            "--queries need; lower --way, --most or --queries, or change --held-out"
        )
    return split


def _tested(learner: Learner, split: ClassSplit, shape: str, config: EpisodeConfig) -> Scores:
    seed = config.seed + FIRST_TEST_SEED * (1 + SHOT_SHAPES.index(shape))
    return judge(learner, episodes(split.test, shape, config.test_episodes, config, seed))


def _row(learner: str, balance: str, shape: str, scores: Scores, plain: Scores, seconds: float) -> dict[str, Any]:
    """Percent; `difference` is relative to the first balance of the same learner, paired by episode."""
    apart = scores.accuracy - plain.accuracy
    return {
        "learner": learner,
        "balance": balance,
        "shape": shape,
        "episodes": len(scores.accuracy),
        "accuracy": round(float(scores.accuracy.mean()), 3),
        "interval": round(scores.interval, 3),
        "difference": round(float(apart.mean()), 3),
        "difference_interval": round(half_interval(apart), 3),
        "training_seconds": round(seconds, 1),
        "by_shots": {count: round(share, 3) for count, share in scores.by_shots.items()},
    }


def _save(rows: list[dict[str, Any]], config: EpisodeConfig, source: Source, split: ClassSplit, folder: Path) -> None:
    columns = [name for name in rows[0] if name != "by_shots"]
    with (folder / "episodes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    record = {
        "config": asdict(config),
        "metakern": __version__,
        "torch": torch.__version__,
        "classes": {
            part: [source.class_names[number] for number in pool.classes] for part, pool in split._asdict().items()
        },
        "rows": rows,
    }
    (folder / "episodes.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _table(rows: list[dict[str, Any]], config: EpisodeConfig) -> str:
    shapes = config.words("shapes")
    cells = {(row["learner"], row["balance"], row["shape"]): row for row in rows}
    lines = [["learner", "balance", *shapes]]
    for name in config.words("learners"):
        for balance in config.words("balances"):
            found = [cells[name, balance, shape] for shape in shapes]
            lines.append([name, balance, *(f"{row['accuracy']:.1f} ± {row['interval']:.1f}" for row in found)])
    return "\n".join(
        [
            aligned(lines),
            f"Accuracy in percent on {config.test_episodes} episodes of {config.way} classes each, with the 95 % "
            "confidence interval over episodes.",
        ]
    )
