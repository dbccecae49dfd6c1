"""What functions and objects of any kind keep between calls counts once, and is as before where a step fails."""

import array
import functools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from tests.engines.test_kept_elsewhere import Criterion, Kept, Losses, Network, entropies


def counting(count: Callable[[], Any]) -> Losses:
    """Losses that depend on a count that goes up."""
    return lambda model, batch: entropies(model(batch[0]), batch) / (1 + float(count()))


def in_a_default() -> Kept:
    def count(seen: list[int] = [0], *, more: list[int] = [0]) -> int:  # noqa: B006
        seen[0] += 1
        more[0] += 1
        return seen[0] + more[0]

    for held in (count.__defaults__, tuple(count.__kwdefaults__.values())):
        held[0][0] = 0
    return counting(count), lambda: count.__defaults__[0][0]


def on_the_function() -> Kept:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        losses.calls += 1
        return entropies(model(batch[0]), batch) / losses.calls

    losses.calls = 0
    return losses, lambda: losses.calls


def on_a_partial() -> Kept:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        whole.calls += 1
        return entropies(model(batch[0]), batch) / whole.calls

    whole: Any = functools.partial(losses)
    whole.calls = 0
    return whole, lambda: whole.calls


@dataclass(slots=True)
class Numbers:
    calls: int = 0

    def up(self) -> int:
        self.calls += 1
        return self.calls


def in_slots() -> Kept:
    numbers = Numbers()
    return counting(numbers.up), lambda: numbers.calls


class Shared:
    calls, seen = 0, list[int]()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        Shared.calls += 1
        type(self).seen.append(1)
        return entropies(model(batch[0]), batch) / (Shared.calls + len(Shared.seen))


def of_a_class_by_its_name() -> Kept:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        Shared.calls += 1
        Shared.seen.append(1)
        return entropies(model(batch[0]), batch) / (Shared.calls + len(Shared.seen))

    Shared.calls = 0
    Shared.seen.clear()
    return losses, lambda: (Shared.calls, len(Shared.seen))


def of_the_class_of_an_object() -> Kept:
    return Shared(), of_a_class_by_its_name()[1]


CALLS = 0


class Counter:
    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        global CALLS
        CALLS += 1
        return entropies(model(batch[0]), batch) / CALLS


def global_of_an_object() -> Kept:
    globals()["CALLS"] = 0
    return Counter(), lambda: CALLS


def in_an_array() -> Kept:
    numbers = array.array("d", [0.0])

    def count() -> float:
        numbers[0] += 1
        return numbers[0]

    return counting(count), lambda: numbers[0]


def in_a_long_list() -> Kept:
    history = [0.0] * 5000

    def losses(model: nn.Module, batch: Any) -> Tensor:
        found = entropies(model(batch[0]), batch)
        history.append(float(found.detach().mean()))
        return found / len(history)

    return losses, lambda: (len(history), sum(history))


def in_many_logs(kind: type) -> Callable[[], Kept]:
    """Of every example of a data set, and some of another kind among them."""

    def made() -> Kept:
        logs: list[Any] = [kind() for _ in range(300)] + [[torch.zeros(1)], {"of": [0]}]

        def losses(model: nn.Module, batch: Any) -> Tensor:
            found = entropies(model(batch[0]), batch)
            for log, loss in zip(logs, found.tolist(), strict=False):
                log.update({len(log): loss}) if kind is dict else log.append(loss)
            logs[-2][0] += 1
            logs[-1]["of"][0] += 1
            return found / (len(logs[0]) + float(logs[-2][0]) + logs[-1]["of"][0])

        return losses, lambda: (sum(map(len, logs)), float(logs[-2][0]), logs[-1]["of"][0])

    return made


def in_a_module_of_the_run() -> Kept:
    count.CALLS = 0  # type: ignore[attr-defined]

    def losses(model: nn.Module, batch: Any) -> Tensor:
        count.CALLS += 1  # type: ignore[attr-defined]
        return entropies(model(batch[0]), batch) / count.CALLS  # type: ignore[attr-defined]

    return losses, lambda: count.CALLS  # type: ignore[attr-defined]


count = sys.modules["a_module_of_the_run"] = types.ModuleType("a_module_of_the_run")

KINDS = (
    in_a_default,
    on_the_function,
    on_a_partial,
    in_slots,
    of_a_class_by_its_name,
    of_the_class_of_an_object,
    global_of_an_object,
    in_an_array,
    in_a_long_list,
    pytest.param(in_many_logs(list), id="in_many_lists"),
    pytest.param(in_many_logs(dict), id="in_many_dicts"),
    in_a_module_of_the_run,
)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("make", KINDS)
def test_counts_once(make: Callable[[], Kept], normalised: bool) -> None:
    """Three steps give what an engine gives that runs either batch a single time, and leave what it leaves."""
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    found = []
    for engine in ("double_backward", "auto"):
        model, (losses, kept) = Network(normalised), make()
        dots = [metakern.grad_dots(model, batch, meta_batch, loss_fn=losses, engine=engine).dots for _ in range(3)]
        found.append((torch.stack(dots), torch.tensor(kept(), dtype=torch.float64)))
    for one, other in zip(*found, strict=True):
        budget.assert_within(other, one, 1.0 + one.abs())


def failing(losses: Losses) -> Iterator[tuple[str, Any, Losses, type[Exception]]]:
    """Ways to fail after passes have run: by engine, the batch, the losses and the error."""
    (x, y), meta = inputs.pair(5, 3, 4, classes=3)
    bad = x.masked_fill(torch.arange(5)[:, None] == 2, torch.nan)

    def fails_for_meta(model: nn.Module, batch: Any) -> Tensor:
        found = losses(model, batch)
        if len(found) == 3:
            raise OSError("no meta batch today")
        return found

    for engine in ("auto", "ghost", "jvp"):
        yield engine, ((bad, y), meta), losses, ValueError
        yield engine, ((x, y), meta), fails_for_meta, OSError


@pytest.mark.parametrize("way", range(6))
def test_what_a_loss_holds_is_as_before_a_step_that_fails(way: int) -> None:
    criterion, generator = Criterion(), torch.Generator().manual_seed(0)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        noise = torch.randn(batch[0].shape, generator=generator, dtype=torch.float64)
        return criterion(model, (batch[0] + noise, batch[1]))

    engine, given, function, error = list(failing(losses))[way]
    before = criterion.centre.clone(), criterion.calls, generator.get_state()
    with pytest.raises(error):
        metakern.l2rw_step(Network(False), *given, loss_fn=function, engine=engine)
    assert torch.equal(criterion.centre, before[0])
    assert criterion.calls == before[1]
    assert torch.equal(generator.get_state(), before[2])


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_what_a_loss_holds_is_as_before_where_the_rule_fails(micro_batch: int | None) -> None:
    calls = []

    def losses(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return entropies(model(batch[0]), batch)

    def rule(dots: Tensor) -> Tensor:
        raise LookupError("no weights today")

    given = inputs.pair(4, 2, 4, classes=3)
    with pytest.raises(LookupError):
        metakern.reweight_step(Network(False), *given, loss_fn=losses, rule=rule, micro_batch=micro_batch)
    assert not calls


def test_the_engine_after_frozen_statistics_begins_where_that_did() -> None:
    """The centre couples the examples beside the normalisation, so the approximation is refused after a pass."""
    calls = []

    def losses(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        logits = model(batch[0])
        return entropies(logits - logits.mean(0), batch)

    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    result = metakern.l2rw_step(Network(True), batch, meta_batch, loss_fn=losses, batchnorm="frozen")
    assert result.engine == "jvp"
    assert calls == [5, 3]


def second_network_fails(kind: str, losses: Losses) -> None:
    """A step whose weight net or label net fails after the train pass; label nets take clean examples too."""
    batch, meta_batch = inputs.pair(4, 2, 4, classes=3)

    class Net(nn.Linear):
        def forward(self, *given: Tensor) -> Tensor:
            raise LookupError("no weights today")

    net = Net(1, 1).double()
    if kind == "weights alone":
        metakern.mwnet_step(
            *(Network(False), net, batch, meta_batch),
            **{"loss_fn": losses, "weight_optimizer": None, "virtual_lr": 0.1, "update_weight_net": False},
        )
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        given = {"label_optimizer": optimizer, "virtual_lr": 0.1, "features": lambda model, batch: batch[0]}
        metakern.mlc_step(Network(False), net, batch, meta_batch, loss_fn=losses, clean_batch=meta_batch, **given)


@pytest.mark.parametrize("kind", ["weights alone", "labels"])
def test_what_a_loss_holds_is_as_before_where_the_second_network_fails(kind: str) -> None:
    calls = []

    def losses(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return entropies(model(batch[0]), batch)

    with pytest.raises(LookupError, match="no weights today"):
        second_network_fails(kind, losses)
    assert not calls
