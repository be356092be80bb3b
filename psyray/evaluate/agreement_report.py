"""The figures of `psyray agreement` for people: a table on the terminal and one picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from psyray.in_words import DASH, number, share
from psyray.plots import BLUE, GREEN, INK, ORANGE, STYLE

Figures = Mapping[str, Any]


def show(figures: Figures, out: Console) -> None:
    """Print the table by stratum, and below it a line for each other figure."""
    title = f"{figures['judge_id']} on {figures['set']}: {figures['comparisons']:,} comparisons, " + (
        f"{figures['prompts']:,} prompts"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("stratum", "judge", "right", "ties", "wrong", "invalid", "longer wins",
                   "lengths alike: judge", "longer wins"):  # fmt: skip
        table.add_column(column, justify="left" if column == "stratum" else "right", overflow="fold")
    for name, stratum in figures["strata"].items():
        judge, matched = stratum["judge"], stratum["length_matched"]
        table.add_row(
            name, interval(judge, "accuracy"), *(number(judge[key]) for key in ("right", "ties", "wrong", "invalid")),
            interval(stratum["longer_wins"], "accuracy"),
            f"{interval(matched['judge'], 'accuracy')} of {decided(matched['judge']):,}",
            interval(matched["longer_wins"], "accuracy"),
        )  # fmt: skip
    out.print(table)
    for line in lines(figures):
        out.print(line, markup=False)


def decided(entry: Figures) -> int:
    """How many comparisons an accuracy stands on."""
    return int(entry["right"] + entry["ties"] + entry["wrong"])


def interval(entry: Figures, key: str = "value", as_share: bool = True) -> str:
    """A figure with its 95 % interval."""
    if entry[key] is None:
        return DASH
    form = share if as_share else number
    if entry["low"] is None:
        return form(entry[key])
    low, high = (f"{100 * entry[k]:.1f}" if as_share else f"{entry[k]:.2f}" for k in ("low", "high"))
    return f"{form(entry[key])} [{low}, {high}]"


def lines(figures: Figures) -> Iterator[str]:
    """What stands below the table."""
    people = figures["people"]
    for name, entry in people.get("kappa", {}).items():
        yield f"kappa with {name}: {interval(entry, as_share=False)} on {entry['comparisons']:,} comparisons"
    for names, value in people.get("kappa_among_people", {}).items():
        yield f"kappa of {names}: {number(value)}"
    if "ceiling" in people:
        yield (
            f"alpha among people {interval(people['alpha_people'], as_share=False)}, "
            f"with the judge {interval(people['alpha_with_judge'], as_share=False)}"
        )
        ceiling = people["ceiling"]
        yield (
            f"human ceiling, one person against the others: {interval(ceiling['people'])}; "
            f"the judge against the same: {interval(ceiling['judge'])}"
        )
    yield position_line(figures["position"])
    yield repetition_line(figures["repetition"])
    if figures["human_ties"]:
        yield f"people call {figures['human_ties']:,} comparisons a tie; they count in kappa and alpha only"
    if figures["unasked"]:
        yield f"not asked, for the budget did not reach them: {figures['unasked']:,} of {figures['comparisons']:,}"
    if figures["dropped"]:
        yield "left out of the set: " + ", ".join(f"{count:,} {why}" for why, count in figures["dropped"].items())


def position_line(position: Figures) -> str:
    """Position bias, or why there is none to measure."""
    if not position["applicable"]:
        return f"position bias: not applicable: {position['why']}"
    return (
        f"position bias: {interval(position['changed'])} of {position['both_orders']:,} verdicts change with the order "
        f"({position['first_shown_wins']:,} for the first shown, {position['second_shown_wins']:,} for the second)"
    )


def repetition_line(repetition: Figures) -> str:
    """Repetition stability, or that it was not measured."""
    if not repetition["comparisons"]:
        return "repetition: not measured (--repeats)"
    return (
        f"repetition: asked again {repetition['times']} x on {repetition['comparisons']:,} comparisons, "
        f"same verdict {interval(repetition['same_verdict'])}, same answer {interval(repetition['same_answer'])}"
    )


def plot(figures: Figures, path: Path) -> None:
    """A PNG: accuracy by stratum with intervals, beside length alone, the length-matched subset and the ceiling."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.8 + 1.7 * max(2, len(figures["strata"])), 3.6), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        _draw(ax, figures)
        figure.savefig(path, format="png", metadata={"Software": None})


def _draw(ax: Axes, figures: Figures) -> None:
    strata = figures["strata"]
    series = (
        ("judge", BLUE, "o", [s["judge"] for s in strata.values()]),
        ("judge, lengths alike", GREEN, "s", [s["length_matched"]["judge"] for s in strata.values()]),
        ("longer wins", ORANGE, "^", [s["longer_wins"] for s in strata.values()]),
    )
    for place, (label, colour, marker, entries) in enumerate(series):
        for x, found in enumerate(entries):
            if found["accuracy"] is not None:
                at = x + 0.18 * (place - 1)
                ax.plot([at, at], [found["low"], found["high"]], color=colour, lw=2, solid_capstyle="butt")
                ax.plot([at], [found["accuracy"]], marker, ms=7, color=colour)
        ax.plot([], [], marker, color=colour, label=label)
    ceiling = figures["people"].get("ceiling", {}).get("people", {}).get("value")
    if ceiling is not None:
        ax.axhline(ceiling, color=INK, lw=1.2, label="one person with the others")
    ax.axhline(0.5, color=INK, lw=1, ls="--", alpha=0.6)
    ax.set_xticks(range(len(strata)), [f"{name}\n{decided(s['judge']):,}" for name, s in strata.items()])
    ax.set_xlim(-0.6, len(strata) - 0.4)
    ax.set_ylim(0, 1.02)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    ax.set_ylabel("agreement with people")
    ax.set_title(f"{figures['judge_id']} on {figures['set']}", loc="left", fontsize=10)
    ax.legend(loc="best", fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")
