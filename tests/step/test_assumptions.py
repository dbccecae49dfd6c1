"""What a function looks at is found wherever it keeps it, and nothing that it has no word for."""

import argparse
import functools
import os
import sys
import threading
import types
from collections import UserDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from os import environ as surroundings
from os import getenv as asked
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.step.programs.assumptions import Assumptions
from metakern.testing import inputs

MODEL = nn.Linear(6, 3).double()
NUMBER = ContextVar("NUMBER", default=1.0)


class Slotted:
    __slots__ = ("power",)


class Derived(Slotted):
    __slots__ = ()


@dataclass(slots=True)
class Numbers:
    power: float = 1.0


class Indexed:
    def __init__(self) -> None:
        self._held = {"power": 1.0}

    def __getitem__(self, key: str) -> float:
        return self._held[key]


class Node:
    def __init__(self, power: float, following: Any) -> None:
        self.power, self.following = power, following


class Trainer:
    shared = 1.0

    def __init__(self) -> None:
        self.power, self.settings, self.epoch = 1.0, types.SimpleNamespace(power=1.0, scale=1.0), 0

    def by_a_string(self, *_: Any) -> float:
        return getattr(self, "power")  # noqa: B009

    def by_strings(self, *_: Any) -> float:
        return sum(getattr(self, name) for name in ("power", "shared"))

    def by_its_dict(self, *_: Any) -> float:
        return self.__dict__["power"]

    def by_two_methods(self, *_: Any) -> float:
        return self.settings.power * self.scale()

    def scale(self) -> float:
        return self.settings.scale

    def by_the_class(self, *_: Any) -> float:
        return self.of_the_class() * self.static()

    @classmethod
    def of_the_class(cls) -> float:
        return cls.shared

    @staticmethod
    def static() -> float:
        return TABLE["power"]

    def __call__(self, *_: Any) -> float:
        return self.power


def nested(depth: int) -> Any:
    found: Any = [1.0]
    for _ in range(depth):
        found = {"in": found}
    return found


def innermost(value: Any) -> list[float]:
    while isinstance(value, dict):
        value = value["in"]
    return value


def chain(length: int) -> Node:
    found = Node(1.0, None)
    for _ in range(length):
        found = Node(1.0, found)
    return found


def last(node: Any) -> Node:
    while node.following is not None:
        node = node.following
    return node


SLOTTED, DERIVED, NUMBERS, INDEXED, TRAINER, TABLE = (
    Slotted(),
    Derived(),
    Numbers(),
    Indexed(),
    Trainer(),
    {"power": 1.0},
)
SLOTTED.power = DERIVED.power = 1.0
DEEP, CHAIN, SPACE, PARSED = nested(40), chain(500), threading.local(), argparse.Namespace(power=1.0)
SPACE.power = 1.0
OTHERS, VIEW, CHOSEN = UserDict(power=1.0), types.MappingProxyType(TABLE), {1, 2}
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)
SCHEDULER = torch.optim.lr_scheduler.StepLR(OPTIMIZER, 1)
RUN = sys.modules["a_run_of_its_own"] = types.ModuleType("a_run_of_its_own")
RUN.POWER = 1.0  # type: ignore[attr-defined]


def helper() -> float:
    return 1.0


helper.power = 1.0  # type: ignore[attr-defined]


def power_of(settings: Any) -> float:
    return settings.power


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def called(*args: Any) -> Any:
        return function(*args)

    return called


def of_an_import(*_: Any) -> float:
    import a_run_of_its_own  # type: ignore[import-not-found]

    return a_run_of_its_own.POWER


def of_a_default(*_: Any, held: list[float] = [1.0]) -> float:  # noqa: B006
    return held[0]


def step_scheduler() -> None:
    OPTIMIZER.step()
    SCHEDULER.step()


def set_lr() -> None:
    OPTIMIZER.param_groups[0]["lr"] *= 2


def in_environment(name: str) -> Callable[[], Any]:
    return lambda: os.environ.__setitem__("A_NUMBER_OF_A_TEST", name)


LOOKS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "slot": (lambda *_: SLOTTED.power, lambda: setattr(SLOTTED, "power", 2.0)),
    "slot of a parent": (lambda *_: DERIVED.power, lambda: setattr(DERIVED, "power", 2.0)),
    "dataclass": (lambda *_: NUMBERS.power, lambda: setattr(NUMBERS, "power", 2.0)),
    "index": (lambda *_: INDEXED["power"], lambda: INDEXED._held.update(power=2.0)),
    "forty dicts": (lambda *_: innermost(DEEP), lambda: innermost(DEEP).append(2.0)),
    "five hundred objects": (lambda *_: last(CHAIN).power, lambda: setattr(last(CHAIN), "power", 2.0)),
    "thread": (lambda *_: SPACE.power, lambda: setattr(SPACE, "power", 2.0)),
    "arguments of a command": (lambda *_: PARSED.power, lambda: setattr(PARSED, "power", 2.0)),
    "UserDict": (lambda *_: OTHERS["power"], lambda: OTHERS.update(power=2.0)),
    "view of a dict": (lambda *_: VIEW["power"], lambda: TABLE.update(power=2.0)),
    "set": (lambda *_: len(CHOSEN), lambda: CHOSEN.add(3)),
    "context": (lambda *_: NUMBER.get(), lambda: NUMBER.set(2.0)),
    "rate of an optimizer": (lambda *_: OPTIMIZER.param_groups[0]["lr"], set_lr),
    "rate of a scheduler": (lambda *_: SCHEDULER.get_last_lr()[0], step_scheduler),
    "epoch of a scheduler": (lambda *_: SCHEDULER.last_epoch, step_scheduler),
    "attribute of a function": (lambda *_: helper.power, lambda: setattr(helper, "power", 2.0)),  # type: ignore[attr-defined]
    "default": (of_a_default, lambda: of_a_default.__kwdefaults__["held"].append(2.0)),
    "closure of a partial": (
        functools.partial((lambda held: lambda *_: held["power"])(TABLE)),
        lambda: TABLE.update(power=3.0),
    ),
    "wrapped": (wrapped(lambda *_: TABLE["power"]), lambda: TABLE.update(power=4.0)),
    "without gradients": (torch.no_grad()(lambda *_: TABLE["power"]), lambda: TABLE.update(power=5.0)),
    "imported inside": (of_an_import, lambda: setattr(RUN, "POWER", 2.0)),
    "environ": (lambda *_: os.environ.get("A_NUMBER_OF_A_TEST"), in_environment("1")),
    "environ by another name": (lambda *_: surroundings.get("A_NUMBER_OF_A_TEST"), in_environment("2")),
    "getenv": (lambda *_: os.getenv("A_NUMBER_OF_A_TEST"), in_environment("3")),
    "getenv by another name": (lambda *_: asked("A_NUMBER_OF_A_TEST"), in_environment("4")),
    "string": (TRAINER.by_a_string, lambda: setattr(TRAINER, "power", 2.0)),
    "strings": (TRAINER.by_strings, lambda: setattr(TRAINER, "power", 3.0)),
    "dict of an object": (TRAINER.by_its_dict, lambda: setattr(TRAINER, "power", 4.0)),
    "two methods, one attribute": (TRAINER.by_two_methods, lambda: setattr(TRAINER.settings, "scale", 2.0)),
    "argument of a function": (lambda *_: power_of(TRAINER.settings), lambda: setattr(TRAINER.settings, "power", 2.0)),
    "classmethod": (TRAINER.by_the_class, lambda: setattr(Trainer, "shared", 2.0)),
    "staticmethod": (TRAINER.by_the_class, lambda: TABLE.update(power=6.0)),
    "object that is called": (TRAINER, lambda: setattr(TRAINER, "power", 5.0)),
    "a function made a method": (
        types.MethodType(lambda self, *_: self.power, TRAINER),
        lambda: setattr(TRAINER, "power", 6.0),
    ),
}


@pytest.mark.parametrize("kind", LOOKS)
def test_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_NUMBER_OF_A_TEST", "0")
    look, change = LOOKS[kind]
    before = Assumptions(MODEL, look)
    TRAINER.epoch += 1  # nothing that anybody looks at
    assert not Assumptions(MODEL, look).differs_from(before)
    change()
    assert Assumptions(MODEL, look).differs_from(before)


class Schedule:
    def value(self) -> float:
        return TABLE["power"] * Trainer.shared


class Scheduled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.schedule = Schedule()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.schedule.value()


def test_methods_of_what_a_model_holds() -> None:
    for change in (lambda: TABLE.update(power=7.0), lambda: setattr(Trainer, "shared", 7.0)):
        model = Scheduled()
        before = Assumptions(model)
        assert not Assumptions(model).differs_from(before)
        change()
        assert Assumptions(model).differs_from(before)


def test_a_hook_of_a_trainer_looks_at_what_it_has_a_word_for() -> None:
    trainer, model = Trainer(), nn.Linear(6, 3)
    model.register_forward_hook(trainer.by_a_string)
    before = Assumptions(model)
    trainer.epoch += 1
    assert not Assumptions(model).differs_from(before)
    trainer.power = 2.0
    assert Assumptions(model).differs_from(before)


def test_cycles_end() -> None:
    around: list[Any] = [1.0]
    around += [around, {"again": around}]
    around.append((around, around))
    look = functools.partial(lambda held, *_: held, around)
    before = Assumptions(MODEL, look)
    around[0] = 2.0
    assert Assumptions(MODEL, look).differs_from(before)


def test_a_compiled_step_refuses_numbers_of_an_optimizer_and_of_slots() -> None:
    torch.manual_seed(0)
    model, numbers = nn.Linear(6, 3).double(), Numbers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses**numbers.power * optimizer.param_groups[0]["lr"]

    given = inputs.pair(8, 3, 6, classes=3)
    for change in (lambda: setattr(numbers, "power", 2.0), lambda: optimizer.param_groups[0].update(lr=0.2)):
        step = metakern.compile_step(model, *given, loss_fn=loss_fn, optimizer=optimizer, backend="eager")
        step(*given)
        change()
        with pytest.raises(ValueError, match="make another step"):
            step(*given)
