"""The modules and tensors of a model, in the order in which `nn.Module` lists them.

A step walks the model a dozen times, and `nn.Module.modules()` is slow: it nests one generator per level.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

_Kind = TypeVar("_Kind")
OWN = frozenset(vars(nn.Module()))
"""Attributes that every `nn.Module` has; any others were set by its class or by other code."""


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The model and everything registered below it."""
    found: dict[int, nn.Module] = {}
    ahead: list[nn.Module | None] = [model]
    while ahead:
        module = ahead.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            ahead += reversed(module._modules.values())
    return list(found.values())


def keepers_of(model: nn.Module) -> list[nn.Module]:
    """Modules whose buffers a forward pass may update: the model's, and those that its modules hold unregistered, in
    plain lists, tuples and dicts.
    """
    modules = modules_of(model)
    ahead = [module for module in modules if not is_torchs_own(type(module))]
    if not ahead:
        return modules
    found = {id(module): module for module in modules}
    while ahead:
        for module in _held_in(vars(ahead.pop()).values(), nn.Module):
            if id(module) in found:  # and so are its submodules
                continue
            for inner in modules_of(module):
                if id(inner) not in found:
                    found[id(inner)] = inner
                    ahead.append(inner)
    return list(found.values())


_DEPTH, _LARGEST = 3, 256
"""How deep lists and dicts are searched, and how many entries they may have: larger ones hold data."""


def _held_in(values: Iterable[Any], kind: type[_Kind], depth: int = _DEPTH) -> Iterator[_Kind]:
    for value in values:
        if isinstance(value, kind):
            yield value
        elif depth and type(value) in (list, tuple, dict) and 0 < len(value) <= _LARGEST:
            yield from _held_in(value.values() if isinstance(value, dict) else value, kind, depth - 1)


def is_torchs_own(kind: type) -> bool:
    return kind.__module__.startswith("torch.")


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Parameters, trainable or not; a tied one once."""
    entries = (p for module in modules_of(model) for p in module._parameters.values() if p is not None)
    return list({id(p): p for p in entries}.values())


def constants_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers without a gradient, also of unregistered modules, and integer or boolean tensors held as
    attributes or in lists there (positions, masks, prompts). A tensor that two modules hold is listed twice.
    """
    modules = keepers_of(model)
    kinds = (tensors for module in modules for tensors in (module._parameters, module._buffers))
    found = [t for tensors in kinds for t in tensors.values() if t is not None and not t.requires_grad]
    attributes = (vars(module).values() for module in modules if not is_torchs_own(type(module)))
    return found + [t for values in attributes for t in _held_in(values, Tensor, depth=1) if _is_whole(t)]


def _is_whole(tensor: Tensor) -> bool:
    """Whether it holds integers or booleans; floating-point tensors may be data that one pass keeps for the next."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The qualified name of a module of the model, "" for the model itself; the type of an unregistered one."""
    return next((name for name, module in model.named_modules() if module is wanted), type(wanted).__name__)


def tensors_held_by(module: nn.Module) -> list[Tensor]:
    """Tensors held as attributes, or in lists there, that a pass may write: no parameters, buffers or activations."""
    values = [value for name, value in vars(module).items() if name not in OWN]
    found = _held_in(values, Tensor)
    return [t for t in found if t.grad_fn is None and not t.is_inference() and not isinstance(t, nn.Parameter)]
