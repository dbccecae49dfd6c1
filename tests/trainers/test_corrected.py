"""corrected.csv, by hand."""

import math

import pytest
import torch
from torch import nn

from metakern.data import Examples, Task
from metakern.trainers.corrected import NAME, correction_table, read_correction, save_corrected


class Proposes:
    def corrected_labels(self, model: nn.Module) -> torch.Tensor:
        return torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])


@pytest.fixture
def task() -> Task:
    """The given labels 0 1 1 1, the true ones 0 0 1 1."""
    train = Examples(torch.zeros(4, 1), torch.tensor([0, 1, 1, 1]), torch.tensor([7, 5, 3, 1]))
    return Task("made-up", train, train, train, ("a", "b"), torch.tensor([0, 0, 1, 1]))


def test_what_is_written_and_read(tmp_path, task):
    save_corrected(tmp_path, Proposes(), nn.Identity(), task)
    lines = (tmp_path / NAME).read_text().splitlines()
    assert lines[:3] == ["id,label,clean_label,proposed,probability,kept", "7,0,0,0,0.9,0.9", "5,1,0,0,0.8,0.2"]
    found = read_correction(tmp_path)
    assert found == pytest.approx((50, 75, 75, 100, 100 * 2 / 3))
    assert correction_table(found, known=True)[4] == ["of the wrong labels, proposed true", "100.0 %"]
    unknown = [["labels", "share"], ["proposed labels other than the given ones", "50.0 %"]]
    assert correction_table(found, known=False) == unknown


def test_other_methods_propose_none(tmp_path, task):
    save_corrected(tmp_path, object(), nn.Identity(), task)
    assert read_correction(tmp_path) is None


def test_without_wrong_labels(tmp_path, task):
    save_corrected(
        tmp_path, Proposes(), nn.Identity(), Task("clean", *[task.train] * 3, ("a", "b"), task.train.targets)
    )
    found = read_correction(tmp_path)
    assert math.isnan(found.repaired)
    assert len(correction_table(found, known=True)) == 5
