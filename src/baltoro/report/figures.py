# matplotlib leaves the types of its keyword arguments open.
# pyright: reportUnknownMemberType=false
"""The figures: matplotlib drawn to inline SVG, one panel each, so that the page can lay them out at any width.

Colours become the page's CSS variables, so that figures follow light and dark mode; text stays text. No words of a
model or document enter a figure: titles are HTML around it. The same numbers give the same bytes.
"""

import io
import re
from collections.abc import Callable, Sequence
from math import isfinite, nan
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from baltoro.report.markup import Html, el

# Stand-ins that matplotlib writes and `_page_colours` replaces.
INK, SOFT, ONE, TWO, THREE = "#1c1c1a", "#8a8a85", "#b4531f", "#1f6f8b", "#6b5ca5"
_VARIABLES = {INK: "--ink", SOFT: "--soft", ONE: "--one", TWO: "--two", THREE: "--three"}
_LINES = ((ONE, "-", "o"), (TWO, "--", "s"), (THREE, ":", "^"))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": SOFT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
}
_STEPS = [1, 2, 2.5, 5, 10]

Points = Sequence[tuple[float, float]]


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean over up to `reach` values on either side, as many on the one as on the other, so that a straight line stays
    what it is; nan and inf are passed over."""
    result: list[float] = []
    for i in range(len(values)):
        side = min(reach, i, len(values) - 1 - i)
        near = [value for value in values[i - side : i + side + 1] if isfinite(value)]
        result.append(fmean(near) if near else nan)
    return result


def loss_curve(key: str, points: Points, alt: str) -> Html:
    """Every step, thin, and the smoothed curve above it."""
    steps, losses = [x for x, _ in points], [y for _, y in points]

    def draw(ax: Axes) -> None:
        _plot(ax, steps, losses, color=SOFT, linewidth=0.7, alpha=0.55)
        _plot(ax, steps, smooth(losses, len(losses) // 30), color=ONE)
        _label(ax, "step", "loss")

    return _svg(key, draw, alt)


def curves(
    key: str, series: dict[str, Points], x: str, y: str, alt: str, *, limits: tuple[float, float] | None, marked: bool
) -> Html:
    """Up to three named curves, told apart by colour and dashes (and by markers where points are few)."""

    def draw(ax: Axes) -> None:
        for (name, points), (colour, dashes, marker) in zip(series.items(), _LINES, strict=False):
            _plot(
                ax,
                [a for a, _ in points],
                [b for _, b in points],
                color=colour,
                linestyle=dashes,
                marker=marker if marked else "",
                label=name,
            )
        _label(ax, x, y)
        if limits:
            ax.set_ylim(*limits)
        else:
            ax.set_ylim(bottom=0)
        if len(series) > 1:
            ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderpad=0.1, columnspacing=1.2)

    return _svg(key, draw, alt)


def _plot(ax: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    ax.plot(x, y, **style)


def _label(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))


def _svg(key: str, draw: Callable[[Axes], None], alt: str) -> Html:
    """`key` is unique on the page: ids of figures must not meet."""
    out = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        draw(figure.subplots())
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # The style sheet inside would apply to the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{key}-", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    text = text.replace("'DejaVu Sans'", "var(--sans)")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return el("div", Html(text), class_="figure", role="img", aria_label=alt)
