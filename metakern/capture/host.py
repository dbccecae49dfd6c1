"""Whether the host may read a tensor's value here, and whether it will be the same in every later step."""

from __future__ import annotations

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from metakern.ops.waiting import host_may_wait as host_may_wait
from metakern.ops.waiting import without_waiting as without_waiting


def is_traced() -> bool:
    """True while a step is traced into a program, which will run on other values."""
    return get_proxy_mode() is not None


def may_look_at_values() -> bool:
    """Whether the host may act on a tensor's value here: neither in a CUDA graph, nor in a program for other values.

    What it would find out there is known by then, since a step is taken before it is captured or traced.
    """
    return host_may_wait() and not is_traced()


def finite_sum(values: Tensor) -> bool:
    """Whether the sum of the values is finite. Then all of them are, but not vice versa. The host waits for it."""
    total = values.detach().sum()
    return bool(total - total == 0)
