"""What a measuring command leaves: figures as JSON, tables as Markdown and on the terminal, a plot, an MLflow run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from psyray.files import write_atomic
from psyray.sections.place import TrackSection
from psyray.track import Point, Tracker

Rows = tuple[list[str], list[list[str]]]  # head, lines


def publish(
    found: Mapping[str, Any],
    out: Path,
    name: str,
    *,
    page: str,
    plot: Callable[[Path], None],
    points: Sequence[Point],
    track: TrackSection,
    say: Callable[[str], None],
) -> None:
    """Write NAME.json, .md and .png into `out` and all of it into an MLflow run with `points` as its curves.

    `found` has at least `set`, the labelled set's name, and `settings`, which become the run's parameters.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = {kind: out / f"{name}.{kind}" for kind in ("json", "md", "png")}
    write_atomic(files["json"], json.dumps(found, indent=1) + "\n")
    write_atomic(files["md"], page)
    plot(files["png"])
    now = int(1000 * time.time())
    with Tracker(track, out, {**found["settings"], "set": found["set"]}, say) as tracker:
        tracker.points(points, now)
        for file in files.values():
            tracker.artifact(file)
    say(f"figures: {files['json']}, table: {files['md']}, plot: {files['png']}")


def markdown(tables: Iterable[Rows]) -> str:
    """The tables in Markdown."""
    return "\n\n".join(_lines([head, ["---"] * len(head), *rows]) for head, rows in tables) + "\n"


def _lines(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_tables(tables: Iterable[Rows], out: Console) -> None:
    """The tables on a terminal."""
    for head, rows in tables:
        table = Table(*head, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        out.print(table)
        out.print()


def percent(interval: Sequence[float]) -> str:
    """[low, value, high] as shares in per cent."""
    low, value, high = (100 * x for x in interval)
    return f"{value:.1f} ({low:.1f}, {high:.1f})"


def points_of(interval: Sequence[float]) -> str:
    """[low, value, high] as a difference in points."""
    low, value, high = (100 * x for x in interval)
    return f"{value:+.1f} ({low:+.1f}, {high:+.1f})"


def bare(interval: Sequence[float]) -> str:
    """The value of [low, value, high] in per cent, alone."""
    return f"{100 * interval[1]:.1f}"
