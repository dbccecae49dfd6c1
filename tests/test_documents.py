"""What the documents show as code runs, and does what they say."""

import contextlib
import copy
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import metakern
from metakern.testing import inputs

ROOT = Path(__file__).parents[1]


def shown(page: str) -> str:
    """The first block of code of a page."""
    found = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def printed() -> Any:
    """Runs a block as a prompt would, with one thread, and returns what it printed."""

    def run(page: str) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(shown(page), page, "exec"), {"__name__": "__main__"})
        return output.getvalue()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def test_first_page(printed: Any) -> None:
    engine, share = printed("README.md").split(" ", 1)
    assert engine == "ghost"
    assert float(share.strip().removeprefix("tensor(").removesuffix(")")) > 0.7


def test_guide(printed: Any) -> None:
    before, after, suspects, wrong = map(float, re.findall(r"([\d.]+)(?:%| least)", printed("docs/guide.md")))
    assert suspects == 200
    assert after < before / 2
    assert wrong > 90


class ManualModule(nn.Module):
    """What the recipe uses of a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, Any] = {}

    def optimizers(self) -> Any:
        return self.configure_optimizers()

    def log(self, name: str, value: Any) -> None:
        self.logged[name] = value


def test_recipe_for_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", SimpleNamespace(LightningModule=ManualModule))
    page: dict[str, Any] = {}
    exec(compile(shown("docs/set-ups.md"), "docs/set-ups.md", "exec"), page)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batch, meta_batch = inputs.pair(6, 3, 4, classes=3, dtype=torch.float32)
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    want = metakern.l2rw_step(twin, batch, meta_batch, optimizer=optimizer)
    module = page["Reweighted"](net)
    module.training_step({"train": list(batch), "meta": list(meta_batch)}, 0)
    assert module.automatic_optimization is False
    assert torch.equal(module.logged["meta_loss"], want.meta_loss)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
