"""What a report says of learned weights: the weighting function, whether it finds wrong labels, accuracy by class."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from metakern.methods import find
from metakern.trainers import train
from metakern.trainers.report import write_report
from metakern.trainers.weighting import read_weighting


@pytest.mark.parametrize(
    ("method", "quantity", "curves"),
    [
        ("mw-net", "loss", ["weight"]),
        ("cmw-net", "loss", ["4", "9"]),
        ("cmw-net-sl", "loss", ["4", "9"]),
        ("mlrnet", "loss above the mean of the class, in every epoch", ["4", "9"]),
        ("curve-net", "loss above the mean of the class, in every epoch", ["4", "9"]),
    ],
)
def test_the_weighting_function_of_a_run(quick, tmp_path, method, quantity, curves):
    run = train(replace(quick, method=method), tmp_path, progress=False)
    found = read_weighting(run.folder)
    assert found is not None
    assert found[0] == quantity
    assert len(found[1]) == 101
    assert sorted(found[2]) == curves
    assert all(0 <= weight <= 1.02 for weights in found[2].values() for weight in weights)
    text = write_report([run.folder], tmp_path / "report.html").read_text()
    assert "The learned weighting function" in text


def test_the_curve_is_the_nets(setup_of):
    step = find("mw-net").begin(setup_of)
    function = step.weighting_function()
    expected = step.weight_net(function.at.unsqueeze(1)).squeeze(1).detach()
    torch.testing.assert_close(function.weights["weight"], expected)
    assert (function.at[0], function.at[-1]) == (0, 5)


@pytest.fixture
def setup_of():
    from metakern.methods import Setup

    model = torch.nn.Linear(2, 2)
    return Setup(None, model, 0, 1, 1, lambda model: torch.optim.SGD(model.parameters(), 0.1))  # type: ignore[arg-type]


def test_report_shows_corruption_and_accuracy_by_class(quick, tmp_path):
    noisy = replace(quick, method="mw-net", data="digits", majority=None, noise="symmetric", noise_rate=0.4, steps=40)
    run = train(noisy, tmp_path, progress=False)
    with np.load(tmp_path / "weights.npz") as stored:
        known = ~np.isnan(stored["mean_weight"])
        flipped = (stored["label"] != stored["clean_label"])[known]
        area = 100 * roc_auc_score(flipped, -stored["mean_weight"][known])
    text = write_report([run.folder], tmp_path / "report.html").read_text()
    assert f"<td>{area:.1f} %</td>" in text
    assert f"in {area:.1f} % of the cases" in text
    assert text.count(f"{100 - run.errors.by_class[3]:.2f} %") >= 1
    assert "weight finds the corruption" in text
    clean = train(replace(quick, method="mw-net"), tmp_path / "clean", progress=False)
    assert "the corruption" not in write_report([clean.folder], tmp_path / "clean.html").read_text()
