"""Rows through a Ray Data pipeline into a stage's folder, kept as they arrive.

The driver writes each finished block before it asks for the next, so a run that is cut off loses only what was
in flight, and its next attempt sends only the rows that have no result yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from psyray.records import Row
from psyray.run import Folder


class Progress:
    """A bar on the terminal and the same numbers in the stage's folder."""

    def __init__(self, folder: Folder, title: str, total: int, done: int = 0, unit: str = "rows") -> None:
        self.folder, self.unit, self.total = folder, unit, total
        every = 0.5 if sys.stderr.isatty() else 15.0
        self.bar = tqdm(total=total, initial=done, desc=title, unit=unit, mininterval=every, dynamic_ncols=True)
        folder.progress(done, total, unit)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, count: int) -> None:
        """Note that `count` more are done."""
        self.bar.update(count)
        self.folder.progress(int(self.bar.n), self.total, self.unit)

    def reach(self, done: int) -> None:
        """Note that `done` are done in all."""
        self.add(done - int(self.bar.n))


def stream(
    folder: Folder,
    todo: list[Row],
    pipeline: Callable[[Any], Any],
    sink: Callable[[list[Row]], object],
    *,
    title: str,
    done: int = 0,
    block_rows: int = 32,
) -> None:
    """Send `todo` through `pipeline(dataset)`; `sink` keeps each batch of results before the next is taken.

    `done` rows of an earlier attempt count in the progress bar.
    """
    if not todo:
        return
    import pyarrow as pa
    import ray

    blocks = [pa.Table.from_pylist(todo[i : i + block_rows]) for i in range(0, len(todo), block_rows)]
    dataset = pipeline(ray.data.from_arrow(blocks))
    with Progress(folder, title, done + len(todo), done) as progress:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            results = batch.to_pylist()
            sink(results)
            progress.add(len(results))


def share(values: Iterable[bool]) -> float:
    """The share that is true; 0 for none."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
