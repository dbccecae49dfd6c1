"""Whether the host may read a tensor's value here, and whether it will be the same in every later step."""

from __future__ import annotations

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from metakern.ops.waiting import host_may_wait as host_may_wait
from metakern.ops.waiting import without_waiting as without_waiting


def is_traced() -> bool:
    """True while a step is traced into a program, which will run on other values."""
    return get_proxy_mode() is not None


def finite_sum(values: Tensor) -> bool:
    """Whether the sum of the values is finite. Then all of them are, but not vice versa. The host waits for it."""
    total = values.detach().sum()
    return bool(total - total == 0)
