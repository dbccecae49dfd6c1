"""Figures of a report, as SVG text whose colours are those of the surrounding page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

# Left out: they would put addresses, and elements that HTML does not know, into the page.
_METADATA = ("Date", "Creator", "Format", "Type")
# Drawn in these and replaced by CSS variables, so that one figure reads on a light and on a dark page.
_INK, _FAINT = "#010203", "#040506"
# Of middle lightness and told apart with any colour vision (after Okabe and Ito).
SERIES = ("#0f8ac9", "#e0682b", "#1a9e77", "#c65fa5", "#b58a00", "#7a7fd6", "#5b8f2a", "#9a6b4f")

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.5,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


@contextmanager
def _figure(name: str, width: float, height: float, columns: int = 1) -> Iterator[tuple[list[Axes], list[str]]]:
    """Axes to draw on, and a list that afterwards holds the figure's SVG."""
    svg: list[str] = []
    settings: dict[Any, Any] = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield list(figure.subplots(1, columns, squeeze=False)[0]), svg
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # Text stays text in the SVG: the page's fonts draw it, also signs that matplotlib's own font lacks.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    svg.append(_themed(buffer.getvalue(), name))


def _themed(text: str, name: str) -> str:
    """Matplotlib's SVG without fixed size, in the page's colours and font, with ids of its own."""
    prefix = re.sub(r"\W+", "-", name) + "-"
    text = text[text.index("<svg") :].replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'<svg ([^>]*?)(?:height|width)="[^"]*pt" ([^>]*?)(?:height|width)="[^"]*pt"', r"<svg \1\2", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1)


def curves(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Test error, losses and share of kept examples over the steps, one colour for each of `runs`."""
    with _figure("training curves", 11, 3.2, columns=3) as (axes, svg):
        titles = "test error, %", "mean loss (dashed: meta set)", "examples with weight above 0, %"
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title)
            axis.set_xlabel("step")
        for colour, (name, metrics) in zip(_colours(), runs.items(), strict=False):
            steps = metrics["step"]
            axes[0].plot(steps, metrics["test_error"], color=colour, label=name)
            axes[1].plot(steps, metrics["loss"], color=colour)
            if not np.isnan(metrics["meta_loss"]).all():
                axes[1].plot(steps, metrics["meta_loss"], color=colour, linestyle="--")
            axes[2].plot(steps, [100 * kept for kept in metrics["kept"]], color=colour)
        axes[0].set_ylim(bottom=0)
        low, high = axes[1].get_ylim()
        if low > 0 and high > 5 * low:
            axes[1].set_yscale("log")
        axes[2].set_ylim(-3, 103)
        axes[0].legend()
    return svg[0]


def _colours() -> Iterator[str]:
    while True:
        yield from SERIES


def weight_distribution(weights: np.ndarray, labels: np.ndarray, class_names: Sequence[str], name: str) -> str:
    """The distribution of mean weights in each class: shares of its examples in bins of equal width on a log scale."""
    known = ~np.isnan(weights)
    weights, labels = weights[known], labels[known]
    positive = weights[weights > 0]
    low = max(float(positive.min()) if positive.size else 0.1, 1e-3) / 1.3
    high = max(float(weights.max()) if weights.size else 1.0, 1.0) * 1.3
    bins = np.geomspace(low, high, 36)
    with _figure(f"weights by class, {name}", 11, 2.8) as (axes, svg):
        axis = axes[0]
        for target, (colour, label) in enumerate(zip(_colours(), class_names, strict=False)):
            own = weights[labels == target]
            if own.size:
                counts, _ = np.histogram(own.clip(low, high), bins)
                axis.stairs(100 * counts / own.size, bins, fill=True, color=colour, alpha=0.3)
                axis.stairs(
                    100 * counts / own.size,
                    bins,
                    color=colour,
                    linewidth=1.5,
                    label=f"{label} ({own.size:,} examples, mean {own.mean():.2g})",
                )
        axis.axvline(1, color=_INK, linewidth=1, linestyle=":")
        axis.set_xscale("log")
        axis.set_xlabel(
            "mean weight, in shares of an equal part (1 = what the plain loss gives; left end: at or below)"
        )
        axis.set_ylabel("examples of the class, %")
        axis.legend()
    return svg[0]


def precision(rankings: Mapping[str, Sequence[float]]) -> str:
    """The share of wrong labels among the most suspicious examples, for tenths of the number of wrong labels."""
    with _figure("precision of the rankings", 11, 3.2) as (axes, svg):
        axis = axes[0]
        for colour, (name, values) in zip(_colours(), rankings.items(), strict=False):
            places = [100 * (j + 1) / len(values) for j in range(len(values))]
            axis.plot(places, [100 * value for value in values], color=colour, label=name, marker="o", markersize=4)
        axis.set_ylim(-3, 103)
        axis.set_xlabel("examples looked at, % of the number of wrong labels")
        axis.set_ylabel("of them wrong, %")
        axis.legend()
    return svg[0]


def error_by_cost(points: Mapping[str, tuple[float, float, float]]) -> str:
    """Test error against cost; for each method (cost in plain steps, mean error, its deviation)."""
    with _figure("test error by cost", 11, 5.2) as (axes, svg):
        axis = axes[0]
        for colour, (name, (cost, mean, deviation)) in zip(_colours(), points.items(), strict=False):
            axis.errorbar(cost, mean, np.nan_to_num(deviation), color=colour, marker="o", capsize=3)
            label = axis.annotate(name, (cost, mean), (5, 3), textcoords="offset points", color=colour, fontsize=8)
            label.set_in_layout(False)  # a name that reaches past the axes must not shrink them
        axis.set_xscale("log")
        costs = [cost for cost, _, _ in points.values()]
        axis.set_xlim(min(costs) / 1.3, max(costs) * 1.6)
        axis.set_xlabel("cost of a run, in plain steps")
        axis.set_ylabel("test error, % (bars: one deviation over seeds)")
    return svg[0]


def error_by_majority(table: Mapping[str, Mapping[float, tuple[float, float]]]) -> str:
    """Test error against the majority share; for each method, share -> (mean, deviation)."""
    with _figure("test error by majority share", 11, 4.6) as (axes, svg):
        axis = axes[0]
        shares = sorted({share for row in table.values() for share in row})
        for colour, (method, row) in zip(_colours(), table.items(), strict=False):
            places = [shares.index(share) for share in sorted(row)]
            means, deviations = np.array([row[share] for share in sorted(row)]).T
            axis.errorbar(places, means, np.nan_to_num(deviations), color=colour, label=method, marker="o", capsize=3)
        axis.set_xticks(range(len(shares)), [f"{100 * share:g} %" for share in shares])
        axis.set_xlabel("share of the majority class in training")
        axis.set_ylabel("test error, % (bars: one deviation over seeds)")
        if all(mean > 0 for row in table.values() for mean, _ in row.values()):
            # A method that fails entirely would press all the others onto the axis.
            axis.set_yscale("log")
            ticks = [tick for power in (0.01, 0.1, 1, 10) for tick in (power, 2 * power, 5 * power)]
            low, high = axis.get_ylim()
            axis.set_yticks([tick for tick in ticks if low < tick < high])
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        axis.legend(fontsize=9 if len(table) <= 12 else 6, ncols=1 + len(table) // 20)
    return svg[0]


def weighting_function(quantity: str, at: Sequence[float], weights: Mapping[str, Sequence[float]], name: str) -> str:
    """The weights of a weight net as functions of one quantity: a curve for each of `weights`."""
    with _figure(f"weighting function, {name}", 11, 2.8) as (axes, svg):
        axis = axes[0]
        for colour, (label, values) in zip(_colours(), weights.items(), strict=False):
            axis.plot(at, values, color=colour, label=label if len(label) < 60 else label[:57] + "...")
        axis.set_ylim(bottom=0)
        axis.set_xlabel(quantity)
        axis.set_ylabel("weight, before normalisation")
        if len(weights) > 1:
            axis.legend()
    return svg[0]
