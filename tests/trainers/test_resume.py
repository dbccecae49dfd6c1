"""A run that was killed goes on as if nothing had been: same model, metrics, weights and draws, to the last bit."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from metakern.methods import METHODS, Method, Outcome
from metakern.trainers import checkpoint, loop, train
from metakern.trainers.evaluate import Errors
from metakern.trainers.metrics import MetricsFile, read_metrics
from metakern.trainers.run_folder import finished


class Killed(BaseException):
    """Not an Exception: nothing in the loop may catch it, as nothing catches a kill."""


@pytest.fixture
def dropout(monkeypatch):
    """A network that draws from the global stream in every step."""

    def network(task, seed, *_):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)
            )

    monkeypatch.setattr(loop, "network_for", network)


def same(first, second) -> None:
    state = second.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.model.state_dict().items())
    ours, theirs = (read_metrics(run.folder / "metrics.csv") for run in (first, second))
    for name in ours.keys() - {"seconds", "steps_per_second"}:
        np.testing.assert_array_equal(ours[name], theirs[name], name)
    assert (first.folder / "weights.csv").read_bytes() == (second.folder / "weights.csv").read_bytes()


def killed_at(monkeypatch, function: str, call: int):
    """Let `function` of the loop be killed instead of its `call`-th call."""
    original, calls = getattr(loop, function), []

    def dying(*arguments, **keywords):
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return original(*arguments, **keywords)

    monkeypatch.setattr(loop, function, dying)


@pytest.mark.parametrize("method", ["random", "mw-net"])
@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("require_finite", 1),
        ("require_finite", 4),
        ("measure_errors", 1),
        ("save_checkpoint", 2),
        ("measure_errors", 3),
        ("finish", 1),
    ],
)
def test_killed_at_any_point(quick, tmp_path, monkeypatch, dropout, method, function, call):
    config = replace(quick, method=method, checkpoint_seconds=0.0, optimizer="adam", warmup=0.5, steps=8)
    whole = train(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        killed_at(patch, function, call)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", progress=False)
    assert finished(tmp_path / "killed", config) is None
    same(whole, train(config, tmp_path / "killed", progress=False))
    assert not (tmp_path / "killed" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("cmw-net", "plain_share=0.2,every=2"),
        ("cmw-net-sl", "warm_up=0.1,every=2"),
        ("curve-net", "first_epoch=1,learning_share=0.7"),
        ("mlrnet-own-step", "every=2"),
        ("mlc-skip", "every=3"),
        ("metabalance", "inner=oversample,outer=smote,inner_batch=8"),
        ("l2rw", "preconditioned=true,balanced_meta=true"),
    ],
)
@pytest.mark.parametrize("call", [2, 6])
def test_what_a_method_has_learned_goes_on(quick, tmp_path, monkeypatch, dropout, method, settings, call):
    own = {"momentum": 0.9, "optimizer": "adam" if method == "l2rw" else "nesterov", "meta_batch_size": 4}
    config = replace(quick, method=method, set=settings, checkpoint_seconds=0.0, steps=8, meta_per_class=8, **own)
    whole = train(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        killed_at(patch, "require_finite", call)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", progress=False)
    same(whole, train(config, tmp_path / "killed", progress=False))


def test_killed_between_checkpoints_and_while_one_is_written(quick, tmp_path, monkeypatch, dropout):
    config = replace(quick, checkpoint_seconds=0.0)
    whole = train(config, tmp_path / "whole", progress=False)
    steps = iter(range(100))
    with monkeypatch.context() as patch:
        # A checkpoint after the second and the fourth step only; the fourth's breaks off half-way.
        patch.setattr(loop.time, "monotonic", lambda: float(next(steps) % 2 == 0) - 1)
        writes = []

        def torn(content, path):
            if writes:
                path.write_bytes(b"half")
                raise Killed
            writes.append(content["state"]["step"])
            original(content, path)

        original = torch.save
        patch.setattr(checkpoint.torch, "save", torn)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", progress=False)
    assert writes
    same(whole, train(config, tmp_path / "killed", progress=False))


def test_killed_from_outside(tmp_path):
    folder, script = (
        tmp_path / "killed",
        (
            "import sys; from pathlib import Path; from metakern.trainers import TrainConfig, train;"
            "train(TrainConfig('mw-net', majority=0.9, steps=60, batch_size=20, evaluations=6, threads=1,"
            " checkpoint_seconds=0.0), Path(sys.argv[1]), progress=False)"
        ),
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)])
    while not (folder / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert stored["state"]["step"] < 60
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
    assert read_metrics(folder / "metrics.csv")["step"] == [10, 20, 30, 40, 50, 60]


def test_preparation_is_done_once(quick, tmp_path, monkeypatch):
    prepared = []

    class Step:
        known = 0.0

        def prepare(self):
            prepared.append(torch.rand(3))
            self.known = 7.0

        def __call__(self, model, batch, meta_batch, *, optimizer, setting):
            assert self.known == 7.0
            return METHODS["uniform"].begin(None)(model, batch, meta_batch, optimizer=optimizer, setting=setting)

        def state_dict(self):
            return {"known": self.known}

        def load_state_dict(self, state):
            self.known = state["known"]

    monkeypatch.setitem(METHODS, "prepared", Method("prepared", "", "", lambda setup: Step()))
    config = replace(quick, method="prepared")
    with monkeypatch.context() as patch:
        killed_at(patch, "require_finite", 1)
        with pytest.raises(Killed):
            train(config, tmp_path, progress=False)
    train(config, tmp_path, progress=False)
    assert len(prepared) == 1


def test_a_full_disk_is_said(quick, tmp_path, monkeypatch):
    def full(content, path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 260288 vs 260240")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint\.pt\.draft cannot be written; is the disk full\? \(\[enforce fail"):
        train(replace(quick, checkpoint_seconds=0.0), tmp_path, progress=False)
    with pytest.raises(OSError, match=r"model\.pt cannot be written"):
        train(quick, tmp_path, progress=False)


def test_a_run_goes_on_behind_the_millionth_step(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.csv", ("a", "b"))
    metrics.begin()
    for step in (1_000_000, 1_234_567):
        metrics.add(Outcome(torch.ones(2) / 2, torch.ones(2), None))
        metrics.write(step, Errors(1.0, 1.0, [1.0, 1.0]))
    metrics.begin(1_000_000)
    assert read_metrics(tmp_path / "metrics.csv")["step"] == [1_000_000]


def test_another_configs_checkpoint_is_not_used(quick, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_at(patch, "measure_errors", 2)
        with pytest.raises(Killed):
            train(replace(quick, checkpoint_seconds=0.0), tmp_path, progress=False)
    assert checkpoint.load_checkpoint(tmp_path, quick.identity()) is not None
    assert checkpoint.load_checkpoint(tmp_path, replace(quick, lr=0.5).identity()) is None
