"""The figures of `psyray label-efficiency` as tables and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from psyray.active.efficiency import BASELINE
from psyray.evaluate.publish import Rows, bare, markdown, percent, points_of, print_tables

SHOWN = (8, 16, 32, 64, 96, 128, 256, 384, 512)  # budgets in the table; the JSON has all


def page(found: Mapping[str, Any]) -> str:
    """The tables as Markdown, accuracies with their intervals."""
    return markdown(tables(found, percent))


def show(found: Mapping[str, Any], out: Console) -> None:
    """The tables on a terminal, accuracies bare."""
    print_tables(tables(found, bare), out)


def tables(found: Mapping[str, Any], share: Callable[[Sequence[float]], str]) -> list[Rows]:
    """Accuracy at some budgets; then what each strategy needs to reach random's level, and where it falls below."""
    told = found["strategies"]
    all_budgets = [row["labels"] for row in next(iter(told.values()))["budgets"]]
    shown = [b for b in SHOWN if b in all_budgets] or all_budgets
    accuracy = [
        [name, *(share(row["accuracy"]) for row in entry["budgets"] if row["labels"] in shown)]
        for name, entry in told.items()
    ]
    aim = found["settings"]["aim"]
    quarter = next(iter(told.values()))["quarter"]["labels"]
    needs = [
        [
            name,
            _labels(entry["labels_to_reach"]),
            " to ".join(map(_labels, entry["labels_to_reach_interval"])),
            points_of(entry["quarter"]["ahead_of_aim"]),
            spans(entry["below"], all_budgets) or "nowhere",
            " ".join(f"{asked:.0%}" for asked in entry["asked"].values()),
        ]
        for name, entry in told.items()
    ]
    head = [
        "strategy",
        f"labels to random's {aim}",
        "interval",
        f"points at {quarter} over it",
        "below random at",
        f"asked {' '.join(found['strata'])}",
    ]
    return [(["strategy", *map(str, shown)], accuracy), (head, needs)]


def spans(some: Sequence[int], every: Sequence[int]) -> str:
    """The budgets as "32, 88-256": runs without a gap in `every` drawn together."""
    runs: list[list[int]] = []
    for budget in every:
        if budget in some:
            if runs and every.index(runs[-1][-1]) + 1 == every.index(budget):
                runs[-1].append(budget)
            else:
                runs.append([budget])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _labels(count: int | None) -> str:
    return "not reached" if count is None else str(count)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy against labels, a line a strategy with its interval as a band; random is black."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (name, entry) in enumerate(found["strategies"].items()):
        colour = "black" if name == BASELINE else matplotlib.colormaps["tab20"](place)
        labels = [row["labels"] for row in entry["budgets"]]
        low, value, high = zip(*(row["accuracy"] for row in entry["budgets"]), strict=True)
        axes.plot(labels, value, color=colour, lw=2.2 if name == BASELINE else 1.2, label=name)
        axes.fill_between(labels, low, high, color=colour, alpha=0.08, lw=0)
    aim = found["settings"]["aim"]
    goal = next(r["accuracy"][1] for r in found["strategies"][BASELINE]["budgets"] if r["labels"] == aim)
    axes.axhline(goal, color="black", lw=0.8, ls="--")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("labels spent")
    axes.set_ylabel("held-out accuracy, mean over strata")
    axes.set_title(f"{found['set']}: dashed, random at {aim} labels")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
