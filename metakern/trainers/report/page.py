"""report.html: a single file that opens without a network connection, in light and dark mode."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_CSS = """
:root { color-scheme: light dark; --paper: #fdfdfb; --card: #ffffff; --ink: #1d232b; --soft: #5d6773; --faint: #c9ced4;
  --accent: #0f8ac9; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --card: #1c2026; --ink: #e4e7eb; --soft: #9aa4b0;
  --faint: #434a54; --accent: #55b4e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
h4 { font-size: .9rem; font-weight: 600; margin: 1rem 0 .3rem; color: var(--soft); }
p, li { max-width: 46rem; } .lead { font-size: 1.1rem; color: var(--soft); margin-top: 0; }
.scroll { overflow-x: auto; } svg { width: 100%; height: auto; display: block; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .35rem .9rem .35rem 0; text-align: right; border-bottom: 1px solid var(--faint);
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child { text-align: left; }
.reading td { white-space: normal; vertical-align: top; }
.reading td:last-child { text-align: left; min-width: 24rem; }
td.best { font-weight: 700; color: var(--accent); }
.gallery { display: flex; flex-wrap: wrap; gap: .5rem; } figure { margin: 0; text-align: center; }
figure img { width: 56px; height: 56px; image-rendering: pixelated; border-radius: 4px;
  border: 1px solid var(--faint); }
figcaption { font-size: .75rem; color: var(--soft); }
details { margin-top: 2.4rem; } summary { cursor: pointer; color: var(--soft); } code { font-size: .9em; }
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole HTML page; `sections` are (heading, HTML), and an empty heading is left out."""
    body = "".join((f"<h2>{escape(heading)}</h2>" if heading else "") + content for heading, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head>'
        f'<body><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{body}</body></html>\n'
    )


def sentence(note: str | None) -> str:
    """A note as an additional sentence of a lead; "" for None."""
    return f" {note[0].upper()}{note[1:]}." if note else ""


def table(rows: Sequence[Sequence[str]], *, best: Sequence[tuple[int, int]] = ()) -> str:
    """Rows of text as a table with the first as its header; the cells at `best` (row, column) are highlighted."""
    head = "".join(f"<th>{escape(text)}</th>" for text in rows[0])
    lines = []
    for r, row in enumerate(rows[1:], start=1):
        cells = (f"<td{' class=best' if (r, c) in best else ''}>{escape(text)}</td>" for c, text in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def settings(entries: Sequence[tuple[str, str]]) -> str:
    """Names and values, collapsed."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in entries)
    return f"<details><summary>All settings</summary><table>{rows}</table></details>"
