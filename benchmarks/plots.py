"""Grouped horizontal bars as SVG: text that a diff can show, in a light and a dark version."""

from html import escape

THEMES = {
    "light": {
        "ink": "#1f2328",
        "grid": "#d1d9e0",
        "series": "#0969da #54aeff #8c959f #afb8c1 #bf8700 #1a7f37 #8250df".split(),
    },
    "dark": {
        "ink": "#f0f6fc",
        "grid": "#3d444d",
        "series": "#4493f8 #9ecbff #6e7681 #8b949e #d29922 #3fb950 #ab7df8".split(),
    },
}
WIDTH, LEFT, BAR, GAP, TOP = 860, 270, 9, 14, 44
LIMIT = 6.0
"""Longer bars are cut there, and their number says how long they are."""


def bars(groups: dict[str, dict[str, float]], series: list[str], unit: str, theme: str) -> str:
    """One group of bars per entry, one bar per series in a fixed colour; the line at 1 is the unit."""
    ink, grid, colours = (THEMES[theme][key] for key in ("ink", "grid", "series"))
    present = [name for name in series if any(name in values for values in groups.values())]
    scale = (WIDTH - LEFT - 50) / LIMIT
    body, y = [], TOP
    for title, values in groups.items():
        middle = y + BAR * len(values) / 2 + 4
        body.append(_text(LEFT - 10, middle, title, ink, "end"))
        for name in present:
            if name in values:
                length = scale * min(values[name], LIMIT)
                colour = colours[series.index(name)]
                body.append(
                    f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 1}" fill="{colour}">'
                    f"<title>{escape(title)}, {escape(name)}: {values[name]:.2f} {unit}</title></rect>"
                )
                if values[name] > LIMIT or name == series[0]:
                    body.append(_text(LEFT + length + 4, y + BAR - 1, f"{values[name]:.2f}", ink, "start", 10))
                y += BAR
        y += GAP
    lines = [
        f'<line x1="{LEFT + scale * k:.1f}" x2="{LEFT + scale * k:.1f}" y1="{TOP - 6}" y2="{y}" stroke="{grid}"'
        f' stroke-width="{2 if k == 1 else 1}"/>'
        for k in range(int(LIMIT) + 1)
    ]
    ticks = [_text(LEFT + scale * k, y + 14, str(k), ink, "middle") for k in range(int(LIMIT) + 1)]
    legend, x = [], 10
    for name in present:
        legend.append(f'<rect x="{x}" y="12" width="10" height="10" fill="{colours[series.index(name)]}"/>')
        legend.append(_text(x + 14, 21, name, ink, "start"))
        x += 30 + 6.6 * len(name)
    ticks.append(_text(WIDTH - 8, y + 30, unit, ink, "end"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 38}" font-family="sans-serif">'
    return "\n".join([head, *lines, *body, *ticks, *legend, "</svg>", ""])


def _text(x: float, y: float, text: str, colour: str, anchor: str, size: int = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}>{escape(text)}</text>"
