"""What runs on this machine, and why the rest does not: `python -m metakern.report`."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from metakern import ops as ops  # registers the operators
from metakern.ops import extension
from metakern.ops.select import OPERATORS

_PACKAGES = ("metakern", "torch", "triton", "numpy", "transformers")


def main() -> None:
    """Print the report."""
    print(report())


def report() -> str:
    """Versions, the compiled module, the devices, and per operator and device which implementation runs."""
    lines = [*_versions(), *_compiled_module(), ""]
    for device in _devices():
        lines += [f"operators on {device}:", *_operators(device), ""]
    return "\n".join(lines).rstrip()


def _versions() -> list[str]:
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return lines


def _compiled_module() -> list[str]:
    if extension.missing is not None:
        return [extension.missing]
    if extension.cuda is None:
        return ["metakern._C: CPU kernels only (no nvcc at install time)"]
    version = extension.cuda.runtime_version()
    return [f"metakern._C: CPU and CUDA kernels (CUDA {version // 1000}.{version % 1000 // 10})"]


def _devices() -> list[torch.device]:
    """The CPU, and one GPU of each model, since kernels depend on the model and not on the card."""
    models = {torch.cuda.get_device_name(k): torch.device("cuda", k) for k in range(torch.cuda.device_count())}
    return [torch.device("cpu"), *models.values()]


def _operators(device: torch.device) -> list[str]:
    lines = []
    width = max(map(len, OPERATORS))
    for name, operator in sorted(OPERATORS.items()):
        reasons = operator.reasons(*operator.contract.example(device))
        runs = [impl for impl, reason in reasons.items() if reason is None]
        lines.append(f"  {name:{width}}  {runs[0]}" + "".join(f", or {impl}" for impl in runs[1:]))
        lines += [f"  {'':{width}}  not {impl}: {reason}" for impl, reason in reasons.items() if reason is not None]
    return lines


if __name__ == "__main__":
    main()
