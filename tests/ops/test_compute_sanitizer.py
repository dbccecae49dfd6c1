"""NVIDIA's compute-sanitizer watches the kernels on a GPU: no access that is misaligned or outside of a tensor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
FOUND = 99
"""Exit status where it found something; pytest's own are single digits."""

# Every operator by every implementation at its last size; and odd sizes in memory with gaps, in the type of training.
SELECTION = "same_result_in_every_run or (matches_reference and strided and bfloat16)"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
def test_kernels_stay_within_their_tensors() -> None:
    """Each tensor in an allocation of its own: within those of torch's cache, what lies beside one is allocated too."""
    command = [str(SANITIZER), "--tool", "memcheck", "--error-exitcode", str(FOUND), sys.executable]
    tests = ["-m", "pytest", "-q", "tests/ops/test_gpu.py", "-k", SELECTION]
    settings = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([*command, *tests], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout, done.stdout[-2000:]
