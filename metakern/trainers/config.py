"""The settings of a run: every field is a command-line option, and all are stored with the results."""

from __future__ import annotations

import argparse
import re
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from metakern.data import NOISE_KINDS, SHAPES, short_name
from metakern.methods import Method

OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")
ENGINES = ("auto", "ghost", "jvp", "double_backward")
LARGEST_SEED = 2**31 - 16  # seeds of the parts of a run, made from this one, must fit into 64 bits


METAVARS: dict[type, str] = {str: "NAME", int: "N", float: "NUMBER"}  # of options without one


def option(default: Any, meaning: str, metavar: str | None = None) -> Any:
    """A field that is an option of the command line."""
    return field(default=default, metadata={"help": meaning, "metavar": metavar})


@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults are the settings of the code published with L2RW (Ren et al., ICML 2018)."""

    method: str
    set: str = option("", "settings of the method, such as rule=floor,weight_decay=5e-4: see its page", "NAME=VALUE")
    data: str = option("digits-4v9", "data set: see 'metakern list', or images:DIR, or csv:FILE")
    label: str | None = option(None, "--data csv:FILE: the column with the classes", "COLUMN")
    group: str | None = option(
        None, "--data csv:FILE: the column with their groups, for --noise hierarchical", "COLUMN"
    )
    leave_out: str | None = option(None, "--data csv:FILE: columns to ignore", "COL,COL")
    data_dir: str | None = option(None, "folder of data sets (default: the environment variable METAKERN_DATA)", "DIR")
    majority: float | None = option(
        None, "sets of two classes: share of the larger one in training (default: 0.995)", "SHARE"
    )
    imbalance: float = option(1.0, "sets of more classes: ratio of largest to smallest class", "FACTOR")
    imbalance_shape: str = option("exponential", f"how class sizes decrease: {', '.join(SHAPES)}", "SHAPE")
    noise: str | None = option(None, f"label noise, one of {', '.join(NOISE_KINDS)}", "KIND")
    noise_rate: float = option(0.0, "share of labels that the noise redraws", "SHARE")
    train_size: int = option(5000, "training and meta examples together, at most")
    meta_per_class: int = option(5, "clean examples of each class, set aside as the meta set")
    model: str | None = option(
        None, "the network: see 'metakern list', or transformers:DIR for a pretrained one (default: a small one)"
    )
    augment: str | None = option(
        None, "crop-flip: shift images of both batches by up to 4 pixels and mirror them, at random", "KIND"
    )
    seed: int = option(0, "determines the drawn examples, the initial parameters and the order of batches")
    steps: int | None = option(None, "optimizer steps (default: the method's own, times --schedule)")
    schedule: float = option(1.0, "share of the method's own number of steps to take", "SHARE")
    batch_size: int | None = option(None, "training examples per batch (default: the method's own)")
    meta_batch_size: int | None = option(None, "meta examples per step (default: the method's own, usually all)")
    optimizer: str = option("sgd", f"the optimizer, one of {', '.join(OPTIMIZERS)}")
    lr: float = option(1e-3, "learning rate", "RATE")
    momentum: float = option(0.9, "momentum of SGD, plain or Nesterov's")
    weight_decay: float = option(0.0, "weight decay")
    warmup: float = option(0.0, "share of the run over which the learning rate rises linearly", "SHARE")
    drops: str = option("", "shares of the run at which the learning rate is divided by 10, such as 0.5,0.75", "S,T")
    early_stopping: int | None = option(None, "stop after this many evaluations without a lower validation error")
    validation: float = option(0.1, "share of the training examples that --early-stopping holds out", "SHARE")
    engine: str = option("auto", f"how the dot products are computed, one of {', '.join(ENGINES)}")
    evaluations: int = option(20, "how often the test error is measured during a run")
    device: str = option("cpu", "where to train: cpu, cuda, cuda:1, ...", "DEVICE")
    amp: str | None = option(None, "bf16: autocast to bfloat16")
    threads: int = option(2, "CPU threads")
    checkpoint_seconds: float = option(60.0, "seconds between checkpoints; 0: one after every step", "SECONDS")
    tensorboard: bool = option(False, "also write the metrics for TensorBoard")

    def __post_init__(self) -> None:
        counts = "train_size", "meta_per_class", "steps", "batch_size", "meta_batch_size", "evaluations", "threads"
        for name in (*counts, "early_stopping"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("schedule", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name)}")
        for name in ("momentum", "weight_decay", "checkpoint_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"--seed must be between 0 and {LARGEST_SEED}, got {self.seed}")
        for name, allowed in (
            ("optimizer", OPTIMIZERS),
            ("engine", ENGINES),
            ("amp", (None, "bf16")),
            ("imbalance_shape", SHAPES),
            ("augment", (None, "crop-flip")),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(choice for choice in allowed if choice)
                raise ValueError(f"--{name.replace('_', '-')} must be one of {known}, got {getattr(self, name)!r}")
        if self.noise not in (None, *NOISE_KINDS):
            raise ValueError(f"--noise must be one of {', '.join(NOISE_KINDS)}, got {self.noise!r}")
        if not (0 < self.noise_rate <= 1 if self.noise else self.noise_rate == 0):
            wanted = f"--noise {self.noise} takes a share above 0, at most 1" if self.noise else "needs a kind, --noise"
            raise ValueError(f"--noise-rate {self.noise_rate:g}: {wanted}")
        for name, shares in (("warmup", [self.warmup]), ("drops", self.drop_shares)):
            if not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"--{name} takes shares of the run, from 0 to 1, got {getattr(self, name)}")

    @property
    def drop_shares(self) -> list[float]:
        """`drops` as numbers.

        Raises: ValueError for a word that is not a number.
        """
        try:
            return [float(word) for word in self.drops.split(",") if word.strip()]
        except ValueError:
            raise ValueError(f"--drops takes shares of the run, as in 0.5,0.75, got {self.drops!r}") from None

    def total_steps(self, method: Method) -> int:
        """The number of steps this run takes with `method`."""
        return self.steps or max(1, round(method.steps * self.schedule))

    def name(self) -> str:
        """A name for the run's folder: the data, its bias, the method and the seed."""
        parts = [short_name(self.data)]
        parts += [f"{self.majority:g}"] if self.majority is not None else []
        shape = "" if self.imbalance_shape == "exponential" else self.imbalance_shape
        parts += [f"{shape}imbalance{self.imbalance:g}"] if self.imbalance != 1 else []
        parts += [f"{self.noise}{self.noise_rate:g}"] if self.noise is not None else []
        parts += [] if self.model is None else [Path(self.model).name.replace(":", "-")]
        parts += [self.method, *([re.sub(r"[^\w.=-]+", "-", self.set)] if self.set else [])]
        return "-".join([*parts, str(self.seed)])

    def identity(self) -> dict[str, Any]:
        """The fields that determine the result: all but location of the data, threads, checkpoints and curves."""
        idle = "data_dir", "threads", "checkpoint_seconds", "tensorboard"
        return {name: value for name, value in asdict(self).items() if name not in idle}


def add_options(
    parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = (), of: type[Any] = TrainConfig
) -> None:
    """Give `parser` one option for each field of `of` that has a default and is not in `leave_out`."""
    hints = typing.get_type_hints(of)
    for entry in fields(of):
        if not entry.metadata or entry.name in leave_out:
            continue
        kinds = [kind for kind in typing.get_args(hints[entry.name]) or (hints[entry.name],) if kind is not type(None)]
        meaning = entry.metadata["help"] + ("" if entry.default in (None, "") else f" (default: {entry.default})")
        name = "--" + entry.name.replace("_", "-")
        if kinds == [bool]:
            parser.add_argument(name, action="store_true", help=entry.metadata["help"])
        else:
            metavar = entry.metadata["metavar"] or METAVARS[kinds[0]]
            parser.add_argument(name, type=kinds[0], default=entry.default, metavar=metavar, help=meaning)


def from_options(options: argparse.Namespace, **given: Any) -> TrainConfig:
    """The TrainConfig of parsed options; `given` fields take precedence."""
    known = {entry.name for entry in fields(TrainConfig)}
    return TrainConfig(**{**{name: value for name, value in vars(options).items() if name in known}, **given})
