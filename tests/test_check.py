"""`metakern.check`: a verdict that can be trusted both ways, and a model left alone."""

import pytest
import torch
from torch import Tensor, nn

import metakern
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


def test_a_model_whose_examples_interact() -> None:
    report = metakern.check(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), *batches())
    assert report.ok
    assert report.engine == "jvp"
    assert "batch_norm" in report.why_not_ghost


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer rule that forgets the bias must not pass."""
    monkeypatch.setattr(linear, "bias_dots", lambda b, direction: torch.zeros(b.shape[0], dtype=b.dtype))
    report = metakern.check(network(), *batches())
    assert not report.ok
    assert "NOT EXACT" in str(report)


def test_a_loss_of_ones_own_and_few_examples() -> None:
    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) ** 2).sum(1)

    assert metakern.check(network(), *batches(), loss_fn=losses, examples=3).ok
    with pytest.raises(ValueError, match="examples must be at least 1"):
        metakern.check(network(), *batches(), examples=0)
