"""What a function looks at is found behind wrappers of torch and of the standard library."""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from array import array
from collections import ChainMap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from metakern.step.programs.assumptions import Assumptions

MODEL = nn.Linear(6, 3).double()
TABLE = {"power": 1.0}


def looked_up(*_: Any) -> float:
    return TABLE["power"]


def change_table() -> None:
    TABLE["power"] += 1


class Meta(type):
    shared = 1.0

    @property
    def computed(cls) -> float:
        return cls.shared

    def method(cls) -> float:
        return TABLE["power"]


class Settings(metaclass=Meta):
    pass


class Trainer:
    power = 1.0

    def scaled(self, name: str, *_: Any) -> float:
        return TABLE[name]

    by_power = functools.partialmethod(scaled, "power")

    @functools.singledispatchmethod
    def of_anything(self, value: Any) -> float:
        return 0.0

    @of_anything.register
    def _(self, value: int) -> float:
        return TABLE["power"]

    def by_attribute(self, *_: Any) -> float:
        return attribute(self)

    def by_method(self, *_: Any) -> float:
        return method(self)

    def looked_up(self) -> float:
        return TABLE["power"]


class Scaled:
    """A descriptor."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __get__(self, held: Any, kind: Any = None) -> float:
        return self.scale


class Described:
    power = Scaled()


attribute, method = operator.attrgetter("power"), operator.methodcaller("looked_up")
TRAINER, DESCRIBED = Trainer(), Described()


@functools.singledispatch
def dispatched(value: Any) -> float:
    return 0.0


@dispatched.register
def _(value: int) -> float:
    return TABLE["power"]


@functools.cache
def cached() -> float:
    return TABLE["power"]


@contextlib.contextmanager
def block() -> Iterator[float]:
    yield TABLE["power"]


def in_a_block(*_: Any) -> float:
    with block() as found:
        return found


def power_of(tensor: Any) -> float:
    return tensor.power


class Holder:
    """Refers to an object without keeping it alive, as a callback does to its trainer."""

    def __init__(self, held: Any) -> None:
        self.proxy, self.reference = weakref.proxy(held), weakref.ref(held)

    def by_proxy(self, *_: Any) -> float:
        return self.proxy.power

    def by_reference(self, *_: Any) -> float:
        return self.reference().power


ARRAY, BYTES, NUMBERS = array("d", [1.0]), bytearray(b"1"), np.ones((4, 4))[::2, ::2]
GENERATOR, OLD_GENERATOR = np.random.default_rng(0), np.random.RandomState(0)
HOLDER, CHAINED = Holder(TRAINER), ChainMap({}, TABLE)
NORMAL = torch.distributions.Normal(0.0, 1.0)
TAGGED = torch.ones(3)
TAGGED.power = MODEL.weight.power = 1.0  # type: ignore[attr-defined]
ALONG = torch.vmap(functools.partial(looked_up))
SLOPE = torch.func.grad(functools.partial(looked_up))
GRADLESS = torch.no_grad()(functools.partial(looked_up))

LOOKS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "vmap of a partial": (lambda *_: ALONG(1), change_table),
    "grad of a partial": (lambda *_: SLOPE(1), change_table),
    "no_grad of a partial": (lambda *_: GRADLESS(1), change_table),
    "partialmethod": (lambda *_: TRAINER.by_power(), change_table),
    "singledispatch": (lambda *_: dispatched(1), change_table),
    "singledispatchmethod": (lambda *_: TRAINER.of_anything(1), change_table),
    "cache": (lambda *_: cached(), change_table),
    "attrgetter": (lambda *_: attribute(TRAINER), lambda: setattr(Trainer, "power", 2.0)),
    "attrgetter in a method": (TRAINER.by_attribute, lambda: setattr(Trainer, "power", 3.0)),
    "methodcaller": (TRAINER.by_method, change_table),
    "property of a metaclass": (lambda *_: Settings.computed, lambda: setattr(Meta, "shared", 2.0)),
    "method of a metaclass": (lambda *_: Settings.method(), change_table),
    "descriptor": (lambda *_: DESCRIBED.power, lambda: setattr(vars(Described)["power"], "scale", 2.0)),
    "context manager": (in_a_block, change_table),
    "distribution": (lambda *_: NORMAL.log_prob(torch.ones(())), lambda: setattr(NORMAL, "scale", torch.ones(()))),
    "weak proxy": (HOLDER.by_proxy, lambda: setattr(TRAINER, "power", 4.0)),
    "weak reference": (HOLDER.by_reference, lambda: setattr(TRAINER, "power", 5.0)),
    "chained dicts": (lambda *_: CHAINED["power"], change_table),
    "array": (lambda *_: ARRAY[0], lambda: ARRAY.__setitem__(0, 2.0)),
    "bytes": (lambda *_: BYTES[0], lambda: BYTES.__setitem__(0, 2)),
    "NumPy array": (lambda *_: NUMBERS[0, 0], lambda: NUMBERS.__setitem__((0, 0), 2.0)),
    "NumPy generator": (lambda *_: GENERATOR.random(), lambda: GENERATOR.random()),
    "old NumPy generator": (lambda *_: OLD_GENERATOR.rand(), lambda: OLD_GENERATOR.rand()),
    "attribute of a tensor": (lambda *_: power_of(TAGGED), lambda: setattr(TAGGED, "power", 2.0)),
    "attribute of a parameter": (lambda *_: power_of(MODEL.weight), lambda: setattr(MODEL.weight, "power", 2.0)),
}


@pytest.mark.parametrize("kind", LOOKS)
def test_is_found(kind: str) -> None:
    look, change = LOOKS[kind]
    before = Assumptions(MODEL, look)
    assert not Assumptions(MODEL, look).differs_from(before)
    change()
    assert Assumptions(MODEL, look).differs_from(before)
