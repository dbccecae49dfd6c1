"""Tables of the experiments' pages, which stand between two marks and are made anew from committed files."""

import re
from collections.abc import Callable


def as_table(lines: list[list[str]]) -> str:
    """Markdown; the first line is the head."""
    head, *others = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *others))


def with_tables(text: str, table: Callable[[str], str]) -> str:
    """The text of a page with `table(name)` between the marks of every name."""
    return re.sub(
        r"<!-- table: (?P<name>[^>]+?) -->\n.*?<!-- end of table -->",
        lambda match: f"<!-- table: {match['name']} -->\n{table(match['name'])}\n<!-- end of table -->",
        text,
        flags=re.DOTALL,
    )
