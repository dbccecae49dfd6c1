"""What a call returns: its tensors, and separate graph nodes for outputs that were made from one another.

An LSTM cell returns h and c, and h is computed from c. The gradient that arrives at c then includes what came through
h, inside the call; a rule that sums over both outputs would count that twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Sequence[Tensor]:
    """Every tensor in nested lists and tuples. Not a generator, because it runs at every call of a pass."""
    if isinstance(value, Tensor):
        return (value,)
    found: list[Tensor] = []
    if isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, (list, tuple)):
                found += tensors_in(item)
    return found


def separated(output: Any, upstream: Iterable[Any]) -> Any:
    """The output; its tensors are cloned if one was computed from another. `upstream`: nodes from before the call."""
    if isinstance(output, Tensor):
        return output
    found = [t for t in tensors_in(output) if t.grad_fn is not None]
    return _copied(output) if len(found) > 1 and _entangled(found, set(upstream)) else output


def _entangled(tensors: list[Tensor], upstream: set[Any]) -> bool:
    ends = [(t.grad_fn, t.output_nr) for t in tensors]
    if len(set(ends)) < len(ends):
        return True
    wanted = set(ends)
    stack, seen = list({node for node, _ in ends}), set(upstream)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not wanted.isdisjoint(node.next_functions):
            return True
        stack.extend(following for following, _ in node.next_functions)
    return False


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone() if output.grad_fn is not None else output
    if isinstance(output, (list, tuple)):
        parts = [_copied(item) for item in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output


def owner_of(output: Tensor, data: list[Tensor]) -> Tensor:
    """The tensor whose gradient is B: the one that `output` is a full view of, if the call made it.

    With more than one position a linear layer returns a view. An activation that then works in place rewrites the
    history of views, and only the owner's edge stays on the path.
    """
    base = output._base
    if base is None or base.numel() != output.numel() or not output.is_contiguous() or not base.is_contiguous():
        return output
    return output if any(base is t or base is t._base for t in data) else base


def unserved(name: str, tensors: Sequence[Tensor]) -> str:
    """Why a call with such outputs cannot be a use."""
    if any(t.is_nested for t in tensors):
        return (
            f"the output of {name}, which takes a parameter, is a nested tensor, in which per-layer dots cannot tell "
            "examples apart; engine='double_backward' may be exact, or pad the batch"
        )
    return (
        f"the output of {name}, which takes a parameter, is complex, but per-layer dots need real tensors; "
        "engine='jvp' is exact"
    )
