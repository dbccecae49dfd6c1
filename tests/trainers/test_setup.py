"""What the loop offers a method: the setup, the setting of each step, and the meta batches."""

from dataclasses import replace

import torch

from metakern.methods import METHODS, Method, find
from metakern.trainers import train


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


def test_meta_batches(quick, tmp_path, monkeypatch):
    _, seen = recording(monkeypatch, meta_batch_size=4)
    train(replace(quick, method="recording"), tmp_path, progress=False)
    assert [len(step[0]) for step in seen[1:]] == [4] * 6
    seen.clear()
    train(replace(quick, method="recording", meta_batch_size=3), tmp_path, progress=False)
    assert [len(step[0]) for step in seen[1:]] == [3] * 6
