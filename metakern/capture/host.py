"""May the host read a tensor's value here, and will it be the same in every later step?"""

from __future__ import annotations

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from metakern.ops.waiting import host_may_wait as host_may_wait
from metakern.ops.waiting import without_waiting as without_waiting


def is_traced() -> bool:
    """True while a step is made into a program, which will run on other values."""
    return get_proxy_mode() is not None


def finite_sum(values: Tensor) -> bool:
    """Is the sum of the values finite? Then all of them are; not the other way round. The host waits for it."""
    total = values.detach().sum()
    return bool(total - total == 0)
