"""Every form that a batch may take, and every loss."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.capture.losses import losses_of
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step


@dataclass
class Output:
    """What transformers' models return, in small."""

    logits: Tensor
    loss: Tensor | None = None


class Encoder(nn.Module):
    """Takes keywords only, masks positions, returns a dataclass with its own mean loss."""

    def __init__(self, returns: str = "dataclass") -> None:
        super().__init__()
        self.returns = returns
        self.embedding, self.layer, self.norm = nn.Embedding(9, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.norm(torch.tanh(self.layer(self.embedding(input_ids))))
        mask = attention_mask.unsqueeze(-1).to(hidden)
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Output(logits, loss) if self.returns == "dataclass" else {"logits": logits, "loss": loss}


def mapping(size: int, seed: int) -> dict[str, Tensor]:
    lengths = inputs.labels(size, classes=4, seed=seed) + 2
    return {
        "input_ids": inputs.labels(size, 5, classes=9, seed=seed + 1),
        "attention_mask": (torch.arange(5) < lengths.unsqueeze(1)).long(),
        "labels": inputs.labels(size, classes=3, seed=seed + 2),
    }


def plain_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    keywords = {key: value for key, value in batch.items() if key != "labels"}
    output = model(**keywords)
    logits = output.logits if isinstance(output, Output) else output["logits"]
    return F.cross_entropy(logits, batch["labels"], reduction="none")


@pytest.mark.parametrize("returns", ["dataclass", "mapping"])
def test_mapping_with_labels(returns: str) -> None:
    torch.manual_seed(0)
    setup = Setup(Encoder(returns).double(), mapping(6, 1), mapping(3, 5))
    truth = setup.oracle(loss_fn=plain_losses)
    assert judge_step(metakern.l2rw_step, setup, truth=truth).result.engine == "ghost"


class TokenTagger(nn.Module):
    """Three logits per position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.embedding(tokens))))


def tagging(size: int, seed: int) -> tuple[Tensor, Tensor]:
    targets = inputs.labels(size, 5, classes=3, seed=seed + 1)
    targets[:, 3:] = -100
    targets[0, 1:] = -100
    return inputs.labels(size, 5, classes=9, seed=seed), targets


def token_losses(reduction: str) -> Any:
    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        each = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none", ignore_index=-100)
        total = each.sum(1)
        return total if reduction == "sum" else total / (batch[1] != -100).sum(1)

    return losses


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_masked_tokens(reduction: str) -> None:
    torch.manual_seed(0)
    setup = Setup(TokenTagger().double(), tagging(6, 1), tagging(3, 5), loss_fn=token_losses(reduction))
    assert judge_step(metakern.l2rw_step, setup).result.engine == "ghost"


def test_token_logits_by_default_are_a_mean_over_counted_positions() -> None:
    class ClassesSecond(TokenTagger):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens).transpose(1, 2)

    torch.manual_seed(0)
    setup = Setup(ClassesSecond().double(), tagging(6, 1), tagging(3, 5))

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return each.sum(1) / (batch[1] != -100).sum(1)

    judge_step(metakern.l2rw_step, setup, truth=setup.oracle(loss_fn=losses))


class Decoder(TokenTagger):
    """A language model whose own loss is that of the next token, or of labels that are shifted already."""

    follows = True

    def forward(self, *, input_ids: Tensor, labels: Tensor) -> Output:
        logits = super().forward(input_ids)
        counted, targets = (logits[:, :-1], labels[:, 1:]) if self.follows else (logits, labels)
        return Output(logits, F.cross_entropy(counted.flatten(0, 1), targets.flatten()))


class VisionLanguageModel(Decoder):
    pass


class DecoderForCausalLM(Decoder):
    follows = False


def reading_of(kind: type[Decoder]) -> Any:
    """The mean over an example's counted tokens, as the own loss of this kind of model reads them."""

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits, labels = model(**batch).logits, batch["labels"]
        if kind.follows:
            logits, labels = logits[:, :-1], labels[:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return each.sum(1) / (labels != -100).sum(1).clamp(min=1)

    return losses


@pytest.mark.parametrize("kind", [VisionLanguageModel, DecoderForCausalLM])
def test_token_labels_are_read_as_by_the_own_loss_of_the_model(
    kind: type[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of neither tells. What was found holds where the own loss cannot be looked at, in a captured step."""
    torch.manual_seed(0)
    batches = [dict(zip(("input_ids", "labels"), tagging(size, size))) for size in (6, 3)]
    setup = Setup(kind().double(), *batches)
    truth = setup.oracle(loss_fn=reading_of(kind))
    assert judge_step(metakern.l2rw_step, setup, truth=truth).result.engine == "ghost"
    monkeypatch.setattr("metakern.capture.losses.host_may_wait", lambda: False)
    judge_step(metakern.l2rw_step, setup, truth=truth)


@pytest.mark.parametrize("kind", [VisionLanguageModel, DecoderForCausalLM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_labels_are_read_right_where_both_readings_cost_the_same(kind: type[Decoder], dtype: torch.dtype) -> None:
    """With a new head, any label costs log C; in half precision, losses nearby are the same number."""
    torch.manual_seed(0)
    model = kind().to(dtype)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    batch = dict(zip(("input_ids", "labels"), tagging(6, 1)))
    losses_of(model, batch, None, "batch")
    nn.init.normal_(model.head.weight)  # now the readings differ, and the first one is remembered
    with torch.no_grad():
        model.embedding.weight *= 10
    found = losses_of(model, batch, None, "batch")
    expected = reading_of(kind)(model, batch)
    budget.assert_within(found, expected, 1 + expected.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_term_of_the_own_loss_is_seen_in_half_precision(dtype: torch.dtype) -> None:
    """As of a router that balances its experts: half a percent of the loss."""

    class WithRouter(DecoderForCausalLM):
        def forward(self, *, input_ids: Tensor, labels: Tensor) -> Output:
            logits = super().forward(input_ids=input_ids, labels=labels).logits
            return Output(logits, 1.005 * F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()))

    torch.manual_seed(0)
    batch = dict(zip(("input_ids", "labels"), tagging(6, 1)))
    with pytest.raises(ValueError, match="trains on another loss"):
        metakern.l2rw_step(WithRouter().to(dtype), batch, batch)


def test_time_major_batch() -> None:
    """Positions first already in the batch: only the loss knows where the examples are."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).sum(0), batch[1], reduction="none")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    for n, m, length in ((6, 3, 5), (5, 3, 5), (1, 3, 5), (4, 4, 4)):
        (x, y), (u, v) = inputs.pair(n, m, length, 4, classes=3)
        setup = Setup(model, (x.transpose(0, 1), y), (u.transpose(0, 1), v), loss_fn=losses)
        setup.select = lambda batch, k: (batch[0][:, k : k + 1], batch[1][k : k + 1])
        model.zero_grad()
        assert judge_step(metakern.l2rw_step, setup).result.engine == "ghost"


def test_soft_labels() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    soft = [(inputs.normal(size, 4, seed=size), inputs.normal(size, 3, seed=9).softmax(1)) for size in (6, 3)]
    judge_step(metakern.l2rw_step, Setup(model, *soft))


def test_several_inputs() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return torch.tanh(self.left(left)) * self.right(right)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(*batch[0]), batch[1], reduction="none")

    torch.manual_seed(0)
    batches = [
        ((inputs.normal(size, 4, seed=1), inputs.normal(size, 2, seed=2)), inputs.labels(size, classes=3))
        for size in (6, 3)
    ]
    setup = Setup(TwoInputs().double(), *batches)
    judge_step(metakern.l2rw_step, setup, truth=setup.oracle(loss_fn=losses))


def squared_error(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().sum(1)


def test_any_batch_with_a_loss_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    batches = [{"x": inputs.normal(size, 4, seed=size), "y": inputs.normal(size, 2, seed=size + 1)} for size in (6, 3)]
    judge_step(metakern.l2rw_step, Setup(model, *batches, loss_fn=squared_error))


def test_train_and_meta_may_have_other_shapes() -> None:
    """Sentences of other lengths, images of other sizes: V does not depend on positions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)
    ).double()
    (batch, _), (_, meta_batch) = inputs.pair(6, 3, 2, 5, 7, classes=3), inputs.pair(6, 3, 2, 9, 6, classes=3)
    judge_step(metakern.l2rw_step, Setup(model, batch, meta_batch))


class Wrapped:
    """A batch of no known kind: only the loss can open it."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


def test_distributions_that_check_their_arguments() -> None:
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.spread, self.back = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, torch.distributions.Normal]:
            code = torch.distributions.Normal(self.mean(x), torch.exp(self.spread(x)))
            return self.back(code.rsample()), code

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        torch.manual_seed(1)  # the oracle draws for one example after another
        back, code = model(batch[0])
        prior = torch.distributions.Normal(torch.zeros_like(code.loc), torch.ones_like(code.scale))
        return (back - batch[0]).square().sum(1) + torch.distributions.kl_divergence(code, prior).sum(1)

    torch.manual_seed(0)
    setup = Setup(Coder().double(), *inputs.pair(5, 3, 4, classes=3), loss_fn=losses, interacting=True)
    checked = torch.distributions.Distribution._validate_args  # torch's compiler, once imported, turns it off
    assert metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, loss_fn=losses).engine == "ghost"
    judge_step(metakern.l2rw_step, setup)
    assert torch.distributions.Distribution._validate_args == checked


def test_objects_with_a_loss() -> None:
    def losses(model: nn.Module, batch: Wrapped) -> Tensor:
        return F.mse_loss(model(batch.x), batch.y, reduction="none").mean(1)

    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    batches = [Wrapped(inputs.normal(size, 4, seed=size), inputs.normal(size, 2, seed=size + 1)) for size in (6, 3)]
    setup = Setup(model, *batches, loss_fn=losses)
    setup.select = lambda batch, k: Wrapped(batch.x[k : k + 1], batch.y[k : k + 1])
    judge_step(metakern.l2rw_step, setup)


def test_binary_logits() -> None:
    """One logit and a sigmoid, as the paper's network has."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]).squeeze(1), batch[1].double(), reduction="none")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 1)).double()
    judge_step(metakern.l2rw_step, Setup(model, *inputs.pair(6, 3, 4, classes=2), loss_fn=losses))


def test_losses_of_very_different_size() -> None:
    """One example a million times louder than another: each is judged by its own |g||v|."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        scale = torch.logspace(-6, 6, len(batch[1]), dtype=torch.float64)
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * scale

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    setup = Setup(model, *inputs.pair(7, 3, 4, classes=3), loss_fn=losses)

    def single(batch: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("the scale belongs to the place in the batch")

    setup.select, setup.interacting = single, True
    judge_step(metakern.l2rw_step, setup)
