"""The commands that pages show can be pasted: a shell makes words of them, and the command line takes these."""

import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from metakern.data import NAMES, is_own
from metakern.methods import find
from metakern.trainers.compare import chosen, grid
from metakern.trainers.config import from_options
from metakern.trainers.networks import MODELS
from metakern.trainers.parser import parser

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash")
# Every command becomes its words, ended by zeros, and a line end; what else a block calls is not there to be run.
SHELL = """
metakern() { printf '%s\\0' "$@" "\n"; }
command_not_found_handle() { :; }
"""


def scripts(page: Path) -> str:
    """The indented blocks that have a command, or a variable for those after them."""
    blocks = re.findall(r"(?:^    .*\n)+", page.read_text(), re.MULTILINE)
    shown = [textwrap.dedent(block) for block in blocks if re.search(r"^ +(metakern |[A-Z]+=)", block, re.MULTILINE)]
    return "\n".join(shown)


def words_of_commands(script: str, folder: Path) -> list[list[str]]:
    """What the command line is given, for each command of the script."""
    assert BASH is not None
    given = {"env": {"PATH": ""}, "cwd": folder, "capture_output": True, "text": True}
    done = subprocess.run([BASH, "-c", SHELL + script], check=True, **given)
    assert not done.stderr, done.stderr
    return [command.split("\0")[:-1] for command in done.stdout.split("\n\0")[:-1]]


def take(words: list[str]) -> None:
    """What a command does before it reads its data."""
    options = parser().parse_args(words)
    if words[0] == "train":
        configs = [from_options(options)]
    elif words[0] == "compare":
        methods = chosen(options.methods)
        base = from_options(options, method=methods[0], majority=options.majorities[0], seed=0)
        configs = grid(base, methods, options.majorities, options.seeds)
    else:
        configs = [from_options(options, method="uniform")] if words[0] == "audit" else []
    for config in configs:
        find(config.method, config.set)
        assert config.data in NAMES or is_own(config.data), config.data
        assert config.model in (None, *MODELS, "transformers:DIR"), config.model


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("experiments/*/README.md"))]


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if scripts(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_of_a_page_can_be_pasted(page: Path, tmp_path: Path) -> None:
    commands = words_of_commands(scripts(page), tmp_path)
    assert commands
    for words in commands:
        try:
            take(words)
        except SystemExit:
            pytest.fail(f"not understood: metakern {' '.join(words)}")


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_a_list_that_an_indented_line_continues_is_torn(tmp_path: Path) -> None:
    torn = "metakern compare --methods \\\n    uniform,\\\n    l2rw\nmetakern train l2rw\n"
    first, second = words_of_commands(torn, tmp_path)
    assert first == ["compare", "--methods", "uniform,", "l2rw"]
    with pytest.raises(SystemExit):
        take(first)
    take(second)
