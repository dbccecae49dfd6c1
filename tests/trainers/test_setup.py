"""What the loop offers a method: the setup, the setting of each step, and the meta batches."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from metakern.methods import METHODS, Method, find
from metakern.methods.method import no_steps
from metakern.trainers import train
from metakern.trainers.batches import make_batches
from metakern.trainers.metrics import read_metrics
from metakern.trainers.report import write_report
from metakern.trainers.task import make_task


def recording(monkeypatch, **options) -> tuple[list, list]:
    """A method "recording" that takes plain steps; its setups, and (meta targets, setting, batch) of every step."""
    setups, seen = [], []

    def begin(setup):
        plain = find("uniform").begin(setup)

        class Step:
            def prepare(self):
                seen.append("prepare")

            def __call__(self, model, batch, meta_batch, *, optimizer, setting):
                seen.append((meta_batch[1], setting, batch))
                return plain(model, batch, meta_batch, optimizer=optimizer, setting=setting)

        setups.append(setup)
        return Step()

    monkeypatch.setitem(METHODS, "recording", Method("recording", "", "", begin, **options))
    return setups, seen


def test_a_step_knows_its_rows_and_its_place(quick, tmp_path, monkeypatch):
    setups, seen = recording(monkeypatch)
    run = train(replace(quick, method="recording"), tmp_path, progress=False)
    assert seen.pop(0) == "prepare"
    (setup,) = setups
    assert setup.task is run.task
    assert setup.model is run.model
    assert (setup.seed, setup.steps, setup.batch_size, setup.classes) == (0, 6, 20, 2)
    assert setup.steps_per_epoch == round(len(run.task.train) / 20)
    assert setup.make_optimizer(run.model).param_groups[0]["lr"] == quick.lr
    for k, (meta_targets, setting, (inputs, targets)) in enumerate(seen):
        assert (setting.step, setting.steps, setting.progress) == (k, 6, k / 6)
        assert torch.equal(run.task.train.inputs[setting.indices], inputs)
        assert torch.equal(run.task.train.targets[setting.indices], targets)
        assert torch.equal(meta_targets, run.task.meta.targets)


def test_preparation_is_part_of_the_time_but_not_of_the_speed(quick, tmp_path, monkeypatch):
    now = [0.0]

    def clock() -> float:
        now[0] += 1
        return now[0]

    def begin(setup):
        plain = find("uniform").begin(setup)

        class Step:
            def prepare(self):
                now[0] += 1e6

            def __call__(self, model, batch, meta_batch, *, optimizer, setting):
                return plain(model, batch, meta_batch, optimizer=optimizer, setting=setting)

        return Step()

    monkeypatch.setitem(METHODS, "slow start", Method("slow start", "", "", begin))
    monkeypatch.setattr("metakern.trainers.metrics.time", SimpleNamespace(perf_counter=clock))
    run = train(replace(quick, method="slow start"), tmp_path, progress=False)
    assert run.seconds > 1e6
    assert all(speed > 0.1 for speed in read_metrics(tmp_path / "metrics.csv")["steps_per_second"])


def test_meta_batches(quick, tmp_path, monkeypatch):
    _, seen = recording(monkeypatch, meta_batch_size=4)
    train(replace(quick, method="recording"), tmp_path, progress=False)
    assert [len(step[0]) for step in seen[1:]] == [4] * 6
    seen.clear()
    train(replace(quick, method="recording", meta_batch_size=3), tmp_path, progress=False)
    assert [len(step[0]) for step in seen[1:]] == [3] * 6


def only_meta(task, seed):
    return replace(task, train=task.meta, clean_targets=task.meta.targets)


def test_a_method_may_change_its_training_set(quick, tmp_path, monkeypatch):
    _, seen = recording(monkeypatch, training_set=only_meta)
    run = train(replace(quick, method="recording", seed=5), tmp_path, progress=False)
    assert torch.equal(run.task.train.ids, run.task.meta.ids)
    assert seen[1][1].class_counts.tolist() == [quick.meta_per_class] * 2


def test_a_method_may_fit_its_model_as_a_whole(quick, tmp_path, monkeypatch):
    class Always(torch.nn.Module):
        def forward(self, inputs):
            return torch.tensor([[0.0, 1.0]]).expand(len(inputs), 2)

    method = Method("whole", "", "", no_steps, fit=lambda setup: Always())
    monkeypatch.setitem(METHODS, "whole", method)
    run = train(replace(quick, method="whole"), tmp_path, progress=False)
    assert run.errors.by_class == [100.0, 0.0]
    assert "the data set is not at hand" not in write_report([run.folder], tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match="as a whole"):
        method.begin(setup=None)


def test_deferred_balance_of_the_batches(quick):
    """The batches of uniform for four fifths of the run, then balanced ones; the same when the run resumes there."""
    config = replace(quick, method="ce-drs", steps=9)
    task = make_task(config)
    deferred, plain = (
        [rows for rows, *_ in islice(make_batches(config, find(m), task), 9)] for m in ("ce-drs", "uniform")
    )
    share = [int((task.train.targets[rows] == 0).sum()) for rows in deferred]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(deferred[:8], plain[:8], strict=True))
    assert share[8] == 10 > max(share[:8])  # 7.2 steps of 9 begin eight of them
    resumed = next(make_batches(config, find("ce-drs"), task, after=8))[0]
    assert torch.equal(resumed, deferred[8])


def test_augmentation_is_of_the_seed_and_the_step_and_of_both_batches(quick, tmp_path, monkeypatch):
    """Ones shifted against a border of zeros: what is cut tells the draw."""
    setups, _ = recording(monkeypatch)
    config = replace(quick, method="recording", augment="crop-flip")
    task = train(config, tmp_path, progress=False).task
    ones = [replace(part, inputs=torch.ones_like(part.inputs)) for part in (task.train, task.meta)]
    task = replace(task, train=ones[0], meta=ones[1])

    def cut(seed: int, step: int) -> list[torch.Tensor]:
        batches = make_batches(replace(config, seed=seed), find("uniform"), task, after=step)
        return [inputs.sum((2, 3)).sort(0).values for inputs, _ in next(batches)[1:]]

    first = cut(0, 0)
    for batch in range(2):
        assert first[batch].unique().numel() > 1
        assert torch.equal(first[batch], cut(0, 0)[batch])
        assert not torch.equal(first[batch], cut(1, 0)[batch])
        assert not torch.equal(first[batch], cut(0, 1)[batch])
    moved = setups[0].augment(ones[0].inputs[:9], torch.Generator().manual_seed(0))
    assert moved.sum((2, 3)).unique().numel() > 1
