"""One row per case and provider, with everything needed to believe it; files only ever grow."""

import csv
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

import metakern

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """A measurement; `status` is "measured", or why there is none."""

    case: str
    shapes: str
    dtype: str
    provider: str
    status: str
    engine: str = ""
    kept: float | None = None
    rounds: int | None = None
    milliseconds: float | None = None
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    processor_ratio: float | None = None
    gigaflops: float | None = None
    flop_ratio: float | None = None
    peak_megabytes: float | None = None
    peak_ratio: float | None = None
    dots_budget_used: float | None = None
    gradient_budget_used: float | None = None

    @property
    def measured(self) -> bool:
        return self.status == "measured"

    @property
    def remark(self) -> str:
        """What stands in a printed table where there is no time."""
        return self.status


@cache
def environment(device: str) -> dict[str, str]:
    """Where and with what the rows of this process were measured."""
    cuda = device == "cuda"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": "yes" if _git("status", "--porcelain", "--", "metakern", "csrc", "benchmarks/*.py") else "no",
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or ""),
        "triton": _triton(),
        "metakern": metakern.__version__,
        "native": "yes" if _native() else "no",
    }


def append(rows: Sequence[Any], device: str, suite: str, folder: Path = RESULTS) -> Path:
    """Add rows, all of one dataclass, to `<suite>-<device>.csv`; its header is written once and must stay the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}-{device}.csv"
    header = [*environment(device), *(field.name for field in fields(rows[0]))]
    if path.exists():
        with path.open() as file:
            known = next(csv.reader(file))
        if known != header:
            raise RuntimeError(f"{path.name} has other columns; start a new file rather than change an old one")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header)
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            writer.writerow(environment(device) | {key: _text(value) for key, value in asdict(row).items()})
    return path


def _text(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _native() -> bool:
    try:
        from metakern import _C  # noqa: F401  # pyright: ignore
    except ImportError:
        return False
    return True
