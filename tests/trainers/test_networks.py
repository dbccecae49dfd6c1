import math

import pytest
import torch

import metakern
from metakern.data import Examples, Task
from metakern.trainers.evaluate import Errors, macro_f1, roc_area
from metakern.trainers.networks import IMAGE_MODELS, network_for


def task(inputs: torch.Tensor, classes: int = 3) -> Task:
    targets = torch.arange(len(inputs)) % classes
    examples = Examples(inputs, targets, torch.arange(len(inputs)))
    return Task("made-up", examples, examples, examples, tuple("abcdefgh"[:classes]), targets)


INPUTS = {
    "LeNet": torch.rand(6, 1, 28, 28),
    "Sequential": torch.rand(6, 3, 16, 16),
    "BagOfTokens": torch.randint(0, 9, (6, 5)),
    "table": torch.rand(6, 4),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_a_network_for_each_kind_of_input(kind):
    made = task(INPUTS[kind])
    first, again, other = (network_for(made, seed) for seed in (1, 1, 2))
    assert first(made.train.inputs).shape == (6, 3)
    values, same, different = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (first, again, other))
    assert torch.equal(values, same)
    assert not torch.equal(values, different)


@pytest.mark.parametrize("kind", INPUTS)
def test_the_ghost_engine_serves_every_network(kind):
    made = task(INPUTS[kind])
    batch = made.train.inputs, made.train.targets
    result = metakern.grad_dots(network_for(made, 0), batch, batch, engine="ghost")
    assert result.engine == "ghost"
    assert torch.isfinite(result.dots).all()


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_named_networks_for_images(name):
    made = task(torch.rand(6, 3, 16, 16))
    model = network_for(made, 0, name)
    result = metakern.grad_dots(model, (made.train.inputs, made.train.targets), (made.meta.inputs, made.meta.targets))
    assert result.engine == ("jvp" if any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) else "ghost")
    with pytest.raises(ValueError, match=f"--model {name} takes colour images"):
        network_for(task(INPUTS["LeNet"]), 0, name)


def test_padding_does_not_count():
    model = network_for(task(INPUTS["BagOfTokens"]), 0)
    short = torch.tensor([[3, 4, 0, 0, 0]])
    torch.testing.assert_close(model(short), model(short[:, :2]))
    assert torch.isfinite(model(torch.zeros(1, 5, dtype=torch.int64))).all()


def test_seed_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    network_for(task(INPUTS["table"]), 0)
    assert torch.equal(torch.rand(1), expected)


def test_no_network_for_other_shapes():
    with pytest.raises(ValueError, match=r"no network for inputs of shape \[n, 2, 3, 4, 5\]"):
        network_for(task(torch.rand(6, 2, 3, 4, 5)), 0)


def test_columns_of_a_table():
    assert Errors(3.0, 4.0, [1.0, 7.0]).columns(("a", "b")) == {"test error": 3, "error on a": 1, "error on b": 7}
    assert Errors(3.0, 4.0, [1.0, 7.0], 99.0).columns(("a", "b"))["area under ROC"] == 99
    many = Errors(3.0, 4.0, [1.0, 7.0, float("nan")]).columns(("a", "b", "c"))
    assert many == {"test error": 3, "mean over classes": 4, "worst class": 7}


def test_macro_f1_is_scikit_learns():
    from sklearn.metrics import f1_score

    predicted, targets = torch.tensor([0, 0, 2, 2, 2, 4, 0]), torch.tensor([0, 2, 2, 2, 0, 1, 0])  # 3 does not occur
    assert macro_f1(predicted, targets, 5) == pytest.approx(f1_score(targets, predicted, average="macro"))


def test_roc_area_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 8, (60,), generator=generator) / 7  # with ties
    positive = torch.rand(60, generator=generator) < 0.3
    assert roc_area(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert math.isnan(roc_area(scores, torch.ones(60, dtype=torch.bool)))
