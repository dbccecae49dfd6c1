"""What objects hold is put back by the methods of built-in types: none of their own is asked, none loses an entry."""

import types
from array import array
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.capture.state.contents import content_of, size_of
from metakern.testing import inputs


class Making(OrderedDict[str, Any]):
    """Gives away an object made anew, as transformers' table of activations does."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


class Recent(OrderedDict[str, int]):
    """Drops the oldest entry, counts, and cannot be made without a size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.asked = size, 0

    def __getitem__(self, key: str) -> int:
        self.asked += 1
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: int) -> None:
        super().__setitem__(key, value)
        while len(self) > self.size:
            del self[next(iter(self))]

    def clear(self) -> None:
        raise TypeError("an archive")

    def copy(self) -> Any:
        raise TypeError("one of its kind")


class Secret(list[int]):
    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Any:
        return iter(())


class Slotted:
    __slots__ = ("count", "late", "seen")

    def __init__(self) -> None:
        self.count, self.seen = 0, [0]


class Derived(Slotted):
    def __init__(self) -> None:
        super().__init__()
        self.more = 1


@dataclass(slots=True)
class Numbers:
    count: int = 0


class Shared:
    calls = 0
    seen: list[int] = []  # noqa: RUF012


def recent() -> Recent:
    found = Recent(3)
    for k, name in enumerate("abc"):
        found[name] = k
    return found


def of_a_library(*bases: type, **methods: Any) -> type:
    """A class of the standard library, as far as its name tells."""
    return type("Sorted", bases, {"__module__": "heapq", **methods})


def entries(value: Any) -> Any:
    """Of a dict, in order, by its own methods."""
    kind = OrderedDict if isinstance(value, OrderedDict) else dict
    return list(kind.items(value))


def slots(value: Any) -> Any:
    return value.count, getattr(value, "late", None), getattr(value, "more", None)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "one that makes entries": (lambda: Making(a=dict, b=list), lambda value: value.pop("a"), entries),
    "recently used, dropped": (recent, lambda value: value.__setitem__("d", 4), entries),
    "recently used, asked": (recent, lambda value: value["a"], entries),
    "recently used, counted": (recent, lambda value: value["a"], lambda value: value.asked),
    "order of a dict": (lambda: {"a": 1, "b": 2}, lambda value: value.update(a=value.pop("a")), entries),
    "defaultdict": (lambda: defaultdict(list, a=[1]), lambda value: value["b"], entries),
    "Counter": (lambda: Counter("aab"), lambda value: value.update("c"), entries),
    "UserDict": (lambda: UserDict(a=1), lambda value: setattr(value, "data", {}), dict),
    "namespace": (lambda: types.SimpleNamespace(a=1), lambda value: setattr(value, "a", 2), lambda value: value.a),
    "deque": (lambda: deque([1, 2, 3], maxlen=3), lambda value: value.append(4), list),
    "list that hides": (lambda: Secret([1, 2]), lambda value: value.append(3), list.copy),
    "set": (lambda: {1, 2}, lambda value: value.add(3), set.copy),
    "array": (lambda: array("d", [1.0, 2.0]), lambda value: value.append(3.0), list),
    "bytearray": (lambda: bytearray(b"ab"), lambda value: value.__setitem__(0, 0), bytes),
    "slots": (Slotted, lambda value: setattr(value, "count", 1), slots),
    "a slot that was empty": (Slotted, lambda value: setattr(value, "late", 1), slots),
    "slots and others": (Derived, lambda value: (setattr(value, "more", 2), setattr(value, "count", 2)), slots),
    "dataclass": (Numbers, lambda value: setattr(value, "count", 1), slots),
    "a long list": (lambda: list(range(5000)), lambda value: value.append(0), len),
    "reader of a library": (
        lambda: of_a_library(dict, __getitem__=lambda self, key: 0)(a=1),
        lambda value: value.pop("a"),
        entries,
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_is_put_back(kind: str) -> None:
    make, change, look = CHANGES[kind]
    value = make()
    before, put_back = look(value), content_of(value)
    assert put_back is not None
    assert look(value) == before
    change(value)
    assert look(value) != before
    put_back()
    assert look(value) == before


def test_a_bound_stays_a_bound() -> None:
    lately, groups = deque([1], maxlen=2), defaultdict(list)
    both = content_of(lately), content_of(groups)
    lately.append(5)
    groups["a"].append(1)
    for put_back in both:
        assert put_back is not None
        put_back()
    assert (list(lately), lately.maxlen, dict(groups), groups["b"]) == ([1], 2, {}, [])


def test_what_a_library_writes_in_its_own_way_is_left_alone() -> None:
    assert content_of(of_a_library(dict, __setitem__=dict.__setitem__)(a=1)) is None
    assert size_of(Secret([1, 2])) == 2


def test_attributes_of_a_class() -> None:
    put_back = content_of(type("More", (Shared,), {"__module__": __name__, "own": 1}))
    assert put_back is not None
    Shared.calls += 1
    Shared.more = 1  # type: ignore[attr-defined]
    put_back()
    assert Shared.calls == 0
    assert not hasattr(Shared, "more")


ACTIVATIONS = Making(tanh=nn.Tanh, relu=nn.ReLU)


class Network(nn.Module):
    """Asks a table of activations by a global name, and a cache of its own for sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.recent = recent()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.recent[f"size {len(x)}"] = len(x)
        return self.second(ACTIVATIONS["tanh"](self.first(x)))


@pytest.mark.parametrize("engine", ["ghost", "jvp"])
def test_a_step_leaves_tables_and_caches_whole(engine: str) -> None:
    model = Network()
    table, recently = list(OrderedDict.items(ACTIVATIONS)), list(OrderedDict.items(model.recent))
    metakern.l2rw_step(model, *inputs.pair(5, 3, 4, classes=3), engine=engine)
    assert list(OrderedDict.items(ACTIVATIONS)) == table
    assert list(OrderedDict.items(model.recent)) == [*recently[2:], ("size 5", 5), ("size 3", 3)]
