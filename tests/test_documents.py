"""What the documents show as code runs, and does what they say."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

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
