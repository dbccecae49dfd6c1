"""`python -m benchmarks.compare REF`: steps of this tree beside those of another commit, in plain steps.

The other commit's package is checked out into a temporary worktree, with the compiled module of this tree. Processes of
the two take turns, since where a process has its memory moves short steps by a tenth and more; each times the cases of
this tree's benchmarks.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.cases import CPU_CASES, named

ROOT = Path(__file__).parents[1]
MEASURE = """
import json, sys
import torch
from benchmarks.cases import CPU_CASES, problem_of
from benchmarks.providers import ours, plain
from benchmarks.timing import interleaved
torch.set_num_threads(int(sys.argv[2]))
problem = problem_of(next(case for case in CPU_CASES if case.name == sys.argv[1]))
steps = {"plain": plain(problem), "metakern": ours(problem)}
for step in steps.values():
    step()
print(json.dumps(interleaved(steps, unit="plain", seconds=float(sys.argv[3]), device="cpu")["metakern"].ratio))
"""


def require_commit(ref: str) -> None:
    """Raises ValueError, with the names there are, if `ref` is no commit of this repository."""
    if _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}").returncode == 0:
        return
    if _git("rev-parse").returncode:
        raise ValueError(f"{ROOT} is no git repository: there is no commit {ref!r} to compare with")
    names = _git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags").stdout.split()
    raise ValueError(f"no commit {ref!r}; REF is a commit's hash, HEAD~N, or one of {', '.join(names)}")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


@contextmanager
def checked_out(ref: str) -> Iterator[Path]:
    """A folder that holds the package `metakern` of a commit, with this tree's compiled module."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, ref], cwd=ROOT, check=True)
        try:
            for module in (ROOT / "metakern").glob("_C*.so"):
                shutil.copy(module, tree / "metakern")
            package = Path(folder) / "package"
            package.mkdir()
            (package / "metakern").symlink_to(tree / "metakern")
            yield package
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def plain_steps(package: Path, case: str, threads: int, seconds: float) -> float:
    """Median plain steps that a step of `package` takes, in a process of its own."""
    path = os.pathsep.join(map(str, (package, ROOT)))
    command = [sys.executable, "-P", "-c", MEASURE, case, str(threads), str(seconds)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case} by {package}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="steps of this tree beside those of another commit, in plain steps")
    parser.add_argument("ref", metavar="REF", help="a commit, branch or tag")
    parser.add_argument("--cases", default="mlp-256-16,conv-64-16,transformer-32-8,lenet-100-10", metavar="A,B")
    parser.add_argument("--rounds", type=int, default=3, metavar="X", help="processes of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="X", help="of each process (default: 5)")
    parser.add_argument("--threads", type=int, default=2, metavar="X", help="default: %(default)s")
    given = parser.parse_args()
    try:
        cases = named(given.cases.split(","), CPU_CASES)
        require_commit(given.ref)
    except ValueError as error:
        parser.error(str(error))
    print(f"{'case':20}{given.ref[:16]:>22}{'this tree':>22}    medians (least - most) of {given.rounds} processes")
    with checked_out(given.ref) as other:
        for case in cases:
            turns = [
                [plain_steps(package, case.name, given.threads, given.seconds) for package in (other, ROOT)]
                for _ in range(given.rounds)
            ]
            cells = [f"{statistics.median(of):.2f} ({min(of):.2f} - {max(of):.2f})" for of in zip(*turns, strict=True)]
            print(f"{case.name:20}{cells[0]:>22}{cells[1]:>22}", flush=True)


if __name__ == "__main__":
    main()
