"""The report's figures: each function turns plain numbers into one SVG text that can stand inside a page.

Text and axes take the page's own colour (`currentColor`), so that one figure fits a light and a dark page.
No SVG names an outside resource.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's text colour until the SVG is written
BLUE, ORANGE, GREEN, PURPLE = "#3b7dd8", "#d9822b", "#2f9e6e", "#9466c9"  # readable on white and on near-black
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.titlesize": 11,
    **dict.fromkeys(
        ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"], INK
    ),
}
Draw = Callable[[Axes], None]
Interval = tuple[float, float, float]  # low, value, high


def _svg(name: str, draw: Draw, size: tuple[float, float] = (5.2, 3.1)) -> str:
    """Draw into one pair of axes and return the `<svg>` element; `name` keeps its ids apart from other figures'."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"| width="[^"]*pt" height="[^"]*pt"', "", text)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    # The figure's wrapper says what it shows; a screen reader should not spell out every tick label.
    return text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def _rounds(ax: Axes, rounds: Sequence[int]) -> None:
    ax.set_xticks(list(rounds), ["start" if n == 0 else str(n) for n in rounds])
    ax.set_xlabel("round")
    ax.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)  # one lone round fills no page


def _legend(ax: Axes) -> None:
    """Above the axes, where it hides no point."""
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1), columnspacing=1.2, borderaxespad=0.2)


def win_rates(rounds: Sequence[int], rates: Sequence[Interval], passed: Sequence[bool]) -> str:
    """Win rate against the start policy with its interval per round; filled where the gate was passed."""

    def draw(ax: Axes) -> None:
        for n, (low, rate, high), good in zip(rounds, rates, passed, strict=True):
            ax.plot([n, n], [low, high], color=BLUE, lw=2, solid_capstyle="butt")
            ax.plot([n], [rate], "o", ms=7, color=BLUE, markerfacecolor=BLUE if good else "none", mew=1.8)
            ax.annotate(f"{100 * rate:.0f} %", (n, rate), xytext=(9, -3), textcoords="offset points", fontsize=9)
        ax.axhline(0.5, color=INK, lw=1, ls="--", alpha=0.6)
        ax.set_ylim(0, 1)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        ax.set_ylabel("win rate against the start")
        _rounds(ax, rounds)

    return _svg("win", draw)


def lengths(rounds: Sequence[int], words: Sequence[float], start: float, allowed: float | None) -> str:
    """Mean answer length in words per round, beside the start's and the band that the gate allows."""

    def draw(ax: Axes) -> None:
        if allowed is not None:
            ax.axhspan(start * (1 - allowed), start * (1 + allowed), color=GREEN, alpha=0.13, lw=0, label="allowed")
        ax.axhline(start, color=INK, lw=1, ls="--", alpha=0.6, label="start")
        ax.plot(rounds, words, "o-", color=ORANGE, ms=6, label="mean words")
        ax.set_ylim(0, 1.1 * max([start * (1 + (allowed or 0)), *words]))
        ax.set_ylabel("words per answer")
        _legend(ax)
        _rounds(ax, rounds)

    return _svg("length", draw)


def label_bars(rounds: Sequence[int], spend: Mapping[str, Sequence[int]]) -> str:
    """Where each round's labels came from, as stacked bars; `spend` maps a source to its count per round."""

    def draw(ax: Axes) -> None:
        floor = [0.0] * len(rounds)
        for (source, counts), colour in zip(spend.items(), (ORANGE, GREEN, BLUE), strict=False):
            ax.bar(rounds, counts, 0.5, bottom=floor, color=colour, label=source)
            floor = [a + b for a, b in zip(floor, counts, strict=True)]
        ax.set_ylim(0, 1.1 * max([1.0, *floor]))
        ax.set_ylabel("labels")
        _legend(ax)
        _rounds(ax, rounds)

    return _svg("labels", draw)


def calibration(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Predicted against observed preference per bin; point areas follow the pair counts."""

    def draw(ax: Axes) -> None:
        ax.plot([0, 1], [0, 1], color=INK, lw=1, ls="--", alpha=0.6)
        for (label, bins), colour in zip(curves.items(), (ORANGE, BLUE), strict=False):
            filled = [b for b in bins if b.get("n")]
            x, y = [b["predicted"] for b in filled], [b["observed"] for b in filled]
            most = max((b["n"] for b in filled), default=1)
            ax.plot(x, y, color=colour, lw=1.2, alpha=0.7)
            ax.scatter(x, y, s=[12 + 70 * b["n"] / most for b in filled], color=colour, label=label, alpha=0.85)
        ax.set_xlim(-0.03, 1.03)
        ax.set_ylim(-0.03, 1.03)
        ax.set_xlabel("predicted preference")
        ax.set_ylabel("observed share")
        _legend(ax)

    return _svg("calibration", draw)


def errors_by_spread(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The share of pairs ranked wrong in equal parts by the heads' spread."""

    def draw(ax: Axes) -> None:
        for (label, groups), colour in zip(curves.items(), (ORANGE, BLUE), strict=False):
            x, y = [g["spread"] for g in groups], [g["error"] for g in groups]
            ax.plot(x, y, color=colour, lw=1.6, marker="o", label=label, alpha=0.85)
        ax.set_xlim(left=0)
        ax.set_ylim(-0.03, 1.03)
        ax.set_xlabel("spread of the heads, logits")
        ax.set_ylabel("ranked wrong")
        _legend(ax)

    return _svg("doubt", draw)


def reward_spread(rounds: Sequence[int], scores: Sequence[Sequence[float]]) -> str:
    """Reward scores of the held-out answers per round: box from quarter to quarter, whiskers at 5 and 95 %."""

    def draw(ax: Axes) -> None:
        line = {"color": INK, "alpha": 0.8}
        ax.boxplot(
            [list(s) for s in scores],
            positions=list(rounds),
            widths=0.45,
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": PURPLE, "alpha": 0.55, "edgecolor": INK},
            medianprops={"color": INK, "lw": 1.8},
            whiskerprops=line,
            capprops=line,
        )
        ax.set_ylabel("reward score")
        _rounds(ax, rounds)

    return _svg("reward", draw)


def acquisition(points: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Which pairs were asked: ensemble margin against spread for each labeller's (margin, spread) points."""

    def draw(ax: Axes) -> None:
        for (source, pairs), colour, marker in zip(points.items(), (ORANGE, BLUE), "o^", strict=False):
            x, y = [p[0] for p in pairs], [p[1] for p in pairs]
            ax.scatter(x, y, s=34, color=colour, marker=marker, label=f"{source} ({len(pairs)})", alpha=0.75, lw=0)
        ax.margins(0.08)
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("score difference in the ensemble")
        ax.set_ylabel("ensemble spread")
        _legend(ax)

    return _svg("acquisition", draw)
