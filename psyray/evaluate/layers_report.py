"""The figures of `psyray layers` as tables and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from psyray.evaluate.publish import Rows, bare, markdown, percent, points_of, print_tables

LEAST = 10  # readings that a terminal shows; the Markdown has all
COLOURS = {"mean": "#3b7dd8", "response": "#2f9e6e", "last": "#d9822b"}


def page(found: Mapping[str, Any]) -> str:
    """The table as Markdown, then what to copy."""
    return f"{markdown([table(found, percent)])}\n{verdict(found)}\n\n```yaml\n{settings(found)}```\n"


def show(found: Mapping[str, Any], out: Console) -> None:
    """The readings that are as good as the best, ten at least, and what to copy."""
    head, rows = table(found, bare)
    shown = max(LEAST, sum(row["as_good"] for row in found["readings"]))
    print_tables([(head, [*rows[:shown], rows[-1]])], out)
    out.print(f"{verdict(found)}\n", markup=False)
    out.print(settings(found), markup=False)


def table(found: Mapping[str, Any], share: Callable[[Sequence[float]], str]) -> Rows:
    """A line a reading, the best first; the last line is "the longer one wins"."""
    head = [
        "layer",
        "pooling",
        "ridge",
        "mean over strata",
        *found["strata"],
        "all pairs",
        "behind the best",
        "as good",
    ]

    def shares(row: Mapping[str, Any]) -> list[str]:
        return [share(row["accuracy"]), *(share(row["strata"][name]) for name in found["strata"]), share(row["all"])]

    rows = [
        [str(row["layer"]), row["pooling"], f"{row['ridge']:g}", *shares(row), points_of(row["behind"]),
         "yes" if row["as_good"] else "no"]
        for row in found["readings"]
    ]  # fmt: skip
    return head, [*rows, ["", "longer wins", "", *shares(found["longer_wins"]), "", ""]]


def verdict(found: Mapping[str, Any]) -> str:
    """The best, and how many cannot be told from it, in words."""
    best, others = found["readings"][0], sum(row["as_good"] for row in found["readings"]) - 1
    return (
        f"Best of {len(found['readings'])} on {found['prompts']} prompts: layer {best['layer']} of {found['layers']}, "
        f"pooling {best['pooling']}. {others} others cannot be told from it here."
    )


def settings(found: Mapping[str, Any]) -> str:
    """The lines for a configuration file."""
    return yaml.safe_dump(found["configuration"], sort_keys=False)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy by layer, a line a pooling with its interval as a band."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for pooling, colour in COLOURS.items():
        rows = sorted((r for r in found["readings"] if r["pooling"] == pooling), key=lambda row: row["layer"])
        layers = [row["layer"] for row in rows]
        low, value, high = zip(*(row["accuracy"] for row in rows), strict=True)
        axes.plot(layers, value, "o-", ms=3, color=colour, label=pooling)
        axes.fill_between(layers, low, high, color=colour, alpha=0.1, lw=0)
    axes.axhline(found["longer_wins"]["accuracy"][1], color="black", lw=0.8, ls="--", label="longer wins")
    axes.set_xlabel("layer (0: the embeddings)")
    axes.set_ylabel("accuracy on prompts left out, mean over strata")
    axes.set_title(f"{found['set']}: what each layer tells")
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=110)
