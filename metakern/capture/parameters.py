"""The parameters that a step works on, and checks that reject models which no engine supports."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import _get_current_function_mode_stack

from metakern.capture.members import modules_of, name_of


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Qualified name -> parameter, for every parameter that requires a gradient; a tied one once.

    Raises: ValueError if there is none; TypeError, NotImplementedError for one that no engine supports.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("model has no parameter with requires_grad=True; there is nothing to train")
    for name, p in found.items():
        if p.is_complex():
            raise TypeError(
                f"parameter '{name}' is complex ({p.dtype}); metakern needs real parameters: store real and imaginary "
                "parts, [..., 2], and apply torch.view_as_complex in the forward pass"
            )
        if hasattr(p, "device_mesh"):
            raise TypeError(
                f"parameter '{name}' is a {type(p).__name__}, split over several processes (fully_shard, "
                "tensor parallelism); metakern needs whole ones: pass the unsplit model together with process_group="
            )
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise NotImplementedError(
                f"parameter '{name}' has a hook on its gradient, which may change the gradient of every example and "
                "would not be called; remove it, and mask or read `.grad` after the step instead"
            )
    return found


def select_parameters(model: nn.Module, trainable: dict[str, nn.Parameter], params: Any) -> dict[str, nn.Parameter]:
    """The trainable parameters that `params` names: None for all, patterns ("layer4.*"), parameters or modules."""
    if params is None:
        return trainable
    if isinstance(params, (str, Tensor, nn.Module)):
        params = [params]
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be None, names, parameters or modules, got {type(params).__name__}")
    names = {id(p): name for name, p in trainable.items()}
    chosen: dict[str, nn.Parameter] = {}
    for entry in params:
        chosen.update(_named_by(entry, trainable, names))
    if not chosen:
        raise ValueError("params selects no trainable parameter of the model")
    return {name: p for name, p in trainable.items() if name in chosen}


def _named_by(entry: Any, trainable: dict[str, nn.Parameter], names: dict[int, str]) -> dict[str, nn.Parameter]:
    if isinstance(entry, str):
        found = {name: p for name, p in trainable.items() if fnmatchcase(name, entry) or name.startswith(entry + ".")}
        if not found:
            raise ValueError(f"params: no trainable parameter matches '{entry}'; there are {list(trainable)[:8]} ...")
        return found
    if isinstance(entry, nn.Module):
        return {names[id(p)]: p for p in entry.parameters() if id(p) in names}
    if isinstance(entry, Tensor):
        if id(entry) not in names:
            raise ValueError(f"params: a tensor of shape {tuple(entry.shape)} is not a trainable parameter of model")
        return {names[id(entry)]: trainable[names[id(entry)]]}
    raise TypeError(f"params must hold names, parameters or modules, got {type(entry).__name__}")


def require_servable(model: Any) -> None:
    """Reject what no engine can handle, with an alternative."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"{type(model).__name__} is not supported: pass model.module"
            + ("" if isinstance(model, nn.DataParallel) else " together with process_group=")
        )
    _require_plain_surroundings()
    reducing = _reducing_wrappers()
    for module in modules_of(model):
        if isinstance(module, reducing):
            name = name_of(model, module)
            raise TypeError(
                f"{f'module {name!r}' if name else 'the model'} is a {type(module).__name__}, which reduces gradients "
                "in hooks that a step would not call, so every process would train on its own; leave it out, and pass "
                "process_group="
            )
        if getattr(module, "scale_grad_by_freq", False):
            raise NotImplementedError(
                f"module '{name_of(model, module)}' has scale_grad_by_freq=True, which divides its gradient by counts "
                "over the batch, so no example has a gradient of its own; set it to False"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"module '{name_of(model, module)}' is a ScriptModule; its calls cannot be traced: pass the original"
            )


def _reducing_wrappers() -> tuple[type[nn.Module], ...]:
    """Modules that reduce gradients over processes once these arrive in `.grad`, which the engines do without."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes long, and without it no module is one
    sharded = () if fsdp is None else (fsdp.FullyShardedDataParallel,)
    return (nn.parallel.DistributedDataParallel, *sharded)


def require_gradients() -> None:
    """Reject inference mode around this call."""
    if torch.is_inference_mode_enabled():
        raise ValueError("the call is inside torch.inference_mode(), where nothing has a gradient; move it outside")


def _require_plain_surroundings() -> None:
    """Reject modes around this call in which the model's calls could not be seen or differentiated."""
    require_gradients()
    if peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "the call is inside a transform of torch.func (grad, vmap, jvp or similar), which rejects writes into "
            "buffers; move the step outside, or use the transform inside the forward pass or loss_fn"
        )
    if torch._C._is_torch_function_all_disabled():
        raise NotImplementedError(
            "torch functions are disabled around the call (torch._C.DisableTorchFunction), so the calls of the model "
            "would not be seen; disable them inside the forward pass or loss_fn instead"
        )
    for mode in _get_current_function_mode_stack():
        if type(mode).__module__.partition(".")[0] not in ("torch", "metakern"):
            raise NotImplementedError(
                f"a TorchFunctionMode, {type(mode).__name__}, is active around the call, and what it does with the "
                "model's functions would not be seen; enter it inside the forward pass or loss_fn instead"
            )
