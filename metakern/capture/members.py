"""The modules and tensors of a model, in the order in which `nn.Module` lists them.

A step walks the model a dozen times, and `nn.Module`'s own walk goes through as many generators as modules are nested.
"""

from __future__ import annotations

from torch import Tensor, nn


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


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Parameters, trainable or not; a tied one once."""
    entries = (p for module in modules_of(model) for p in module._parameters.values() if p is not None)
    return list({id(p): p for p in entries}.values())


def constants_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers without a gradient; one that two modules hold comes twice."""
    kinds = (tensors for module in modules_of(model) for tensors in (module._parameters, module._buffers))
    return [t for tensors in kinds for t in tensors.values() if t is not None and not t.requires_grad]


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The qualified name of a module of the model, "" for the model itself."""
    return next(name for name, module in model.named_modules() if module is wanted)
