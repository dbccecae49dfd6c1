"""`metakern.check`: a verdict that can be trusted both ways, and a model left alone."""

import random
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import metakern
from metakern.cli import main
from metakern.engines import recorded
from metakern.layers import linear
from metakern.testing import inputs
from metakern.testing.judge import Snapshot


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3))


def batches(n: int = 10, m: int = 4) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    (x, y), (mx, my) = inputs.pair(n, m, 4, classes=3)
    return (x.float(), y), (mx.float(), my)


def test_an_exact_model() -> None:
    model = network()
    before = Snapshot.of(model)
    report = metakern.check(model, *batches())
    before.assert_unchanged(model)
    assert report.ok
    assert report.engine == "ghost"
    assert [row.name for row in report.parameters] == [name for name, _ in model.named_parameters()]
    assert sum(row.share for row in report.parameters) == pytest.approx(1.0)
    assert report.parameters[0].uses == "linear"
    text = str(report)
    assert text.endswith("exact")
    assert "dropout was switched off" in text


def test_a_model_that_keeps_something_of_its_last_pass() -> None:
    """A pruned weight and an auxiliary loss have a graph, and torch copies no tensors that have."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.penalties = prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5), list[Tensor]()

        def forward(self, x: Tensor) -> Tensor:
            logits = self.layers(x)
            self.penalties = [logits.square().sum(1)]
            return logits

    model = Keeping()
    batch, meta_batch = batches()
    model(batch[0])
    kept = model.penalties[0]
    assert metakern.check(model, batch, meta_batch).ok
    assert model.penalties[0] is kept
    assert kept.requires_grad


def test_a_model_whose_examples_interact() -> None:
    report = metakern.check(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), *batches())
    assert report.ok
    assert report.engine == "jvp"
    assert "batch_norm" in report.why_not_ghost


def forget_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer rule that forgets the bias."""
    monkeypatch.setattr(linear, "bias_dots", lambda b, direction: torch.zeros(b.shape[0], dtype=b.dtype))


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step finds it by itself and takes the next engine; where it does not look, the comparison does."""
    forget_biases(monkeypatch)
    report = metakern.check(network(), *batches())
    assert report.ok
    assert report.engine == "jvp"
    assert "the sum of the dots disagrees with a plain backward pass" in report.why_not_ghost
    monkeypatch.setattr(recorded, "expected", lambda *_: None)
    report = metakern.check(network(), *batches())
    assert not report.ok
    assert "NOT EXACT" in str(report)


def test_a_loss_of_ones_own_and_few_examples() -> None:
    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) ** 2).sum(1)

    assert metakern.check(network(), *batches(), loss_fn=losses, examples=3).ok
    with pytest.raises(ValueError, match="examples must be at least 1 and whole"):
        metakern.check(network(), *batches(), examples=0)


MODELS = """
import torch
from torch import nn

def batches():
    return [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (6, 3)]

def good():
    return (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), *batches())

def own_loss():
    return (*good(), lambda model, batch: model(batch[0]).square().sum(1))

def refused():
    tokens = [(torch.randint(9, (n,)), torch.randint(3, (n,))) for n in (6, 3)]
    return (nn.Embedding(9, 3, scale_grad_by_freq=True), *tokens)

def pooled():
    model, *batches = good()
    model.register_parameter("pooler", nn.Parameter(torch.ones(3)))
    return (model, *batches)

def nothing():
    return nn.Linear(4, 3)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_models", None)


@pytest.mark.usefixtures("models")
def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["check", "own_models:good"]) == 0
    assert capsys.readouterr().out.endswith("exact\n")
    assert main(["check", "own_models:own_loss", "--examples", "2", "--explain"]) == 0
    assert "0.weight, 0.bias" in capsys.readouterr().out
    for options in ([], ["--explain"]):
        assert main(["check", "own_models:refused", *options]) == 1
        assert "rejected: module '' has scale_grad_by_freq" in capsys.readouterr().out
    forget_biases(monkeypatch)
    monkeypatch.setattr(recorded, "expected", lambda *_: None)
    assert main(["check", "own_models:good"]) == 1
    assert "NOT EXACT" in capsys.readouterr().out


class Straight(torch.autograd.Function):
    """A sign with the derivative of the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.sign() * w

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x.sign()).sum(0)


def test_the_reason_is_that_of_the_engine() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return Straight.apply(self.linear(x), self.scale)

    def guarded(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        assert torch.isfinite(losses).all(), "bad loss"
        return losses

    report = metakern.check(Custom(), *batches())
    assert report.ok
    assert "register_layer" in report.why_not_ghost
    report = metakern.check(nn.Linear(4, 3), *batches(), loss_fn=guarded)
    assert "bad loss" in report.why_not_ghost
    assert metakern.check(nn.Linear(4, 3), *batches(), engine="jvp").why_not_ghost == ""


@pytest.mark.parametrize("options", [{"micro_batch": 3}, {"memory": "two_pass"}, {"params": "0"}])
def test_with_the_options_of_a_step(options: dict) -> None:
    model = network()
    report = metakern.check(model, *batches(), **options)
    assert report.ok
    shares = [row.share for row in report.parameters]
    assert sum(shares) == pytest.approx(1.0)
    assert ("params" in options) == (shares[-1] == 0)
    if "params" in options:
        assert metakern.check(model, *batches(), params=model[0]).parameters == report.parameters


@pytest.mark.usefixtures("models")
def test_command_with_parameters_that_take_no_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "own_models:pooled"]) == 2
    assert "'pooler'" in capsys.readouterr().err
    assert main(["check", "own_models:pooled", "--allow-unused", "--explain"]) == 0


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("own_models", "module:function"),
        ("no_such_module:good", "No module named 'no_such_module'"),
        ("own_models:bad", "has no attribute 'bad'"),
        ("own_models:nothing", "must return (model, batch, meta_batch)"),
    ],
)
def test_command_with_an_unusable_target(target: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", target]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_random_numbers_and_the_loss_stay_as_they_were(fails: bool) -> None:
    calls = []

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(random.random() + float(torch.rand(())))
        if fails and len(calls) > 1:
            raise RuntimeError("no loss")
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model = network()
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(RuntimeError, match="no loss") if fails else nullcontext():
        metakern.check(model, *batches(), loss_fn=losses)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert not calls


def test_a_mean_for_a_loss_of_each_example() -> None:
    model, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.arange(4) % 2)
    with pytest.raises(ValueError, match=r"one loss per example, shape \[n\], got shape \(\)"):
        metakern.check(model, batch, batch, loss_fn=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
