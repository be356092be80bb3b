"""Rows through a Ray Data pipeline into a stage's folder, kept as they arrive.

What is to be done lies in one Arrow file in the stage's folder, from which Ray's tasks read a block when its turn
comes; the driver keeps each result before it asks for the next. So neither the input nor the output of a stage has
to fit into memory, a run that is cut off loses only what was in flight, and its next attempt sends only the rows
that have no result yet.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from psyray.errors import from_workers
from psyray.records import Row
from psyray.run import Folder

CALLS = "calls"  # where in a stage's folder an engine keeps the journal of its calls
BLOCKS = 4_000  # more blocks than this cost the driver more than they win
READERS = 2  # tasks that read blocks at a time: some hundred blocks a second
KEEP_EVERY_S = 1.0


class Progress:
    """A bar on the terminal and the same numbers in the stage's folder."""

    def __init__(self, folder: Folder, title: str, total: int, done: int = 0, unit: str = "rows") -> None:
        self.folder, self.unit, self.total, self.done = folder, unit, total, done
        self.bar = tqdm(total=total, initial=done, desc=title, unit=unit, **_bar())
        folder.progress(done, total, unit)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, count: int) -> None:
        """Note that `count` more are done."""
        self.done += count  # a bar that is off (TQDM_DISABLE) counts nothing
        self.bar.update(count)
        self.folder.progress(self.done, self.total, self.unit)

    def reach(self, done: int) -> None:
        """Note that `done` are done in all."""
        self.add(done - self.done)


def _bar() -> dict[str, Any]:
    """How often a bar is drawn: seldom into a file."""
    return {"mininterval": 0.5 if sys.stderr.isatty() else 15.0, "dynamic_ncols": True}


@from_workers
def stream(
    folder: Folder,
    todo: Iterable[Row],
    pipeline: Callable[[Any], Any],
    sink: Callable[[list[Row]], object],
    *,
    title: str,
    schema: pa.Schema,
    total: int,
    done: int = 0,
) -> None:
    """Send `todo` through `pipeline(dataset)`; `sink` keeps the results, a second's worth at a time.

    `todo` may be longer than memory; its rows have the columns of `schema`. `total` rows are expected in all, with
    the `done` ones of an earlier attempt: it sets the size of the blocks, and the progress bar shows both.
    """
    path = folder.path / "todo.arrow"
    # Questions are reserved in the ledger while they are read, which takes minutes where there are many.
    gathered = tqdm(todo, desc=f"{title}: gathering", unit="rows", total=total - done, delay=5, **_bar())
    counts = write_blocks(path, gathered, schema, max(32, -(-total // BLOCKS)))
    if counts:
        with Progress(folder, title, done + sum(counts), done) as progress:
            for results in _in_time(pipeline(_dataset(path, counts)), sink):
                progress.add(results)
    path.unlink()


def write_blocks(path: Path, todo: Iterable[Row], schema: pa.Schema, block_rows: int) -> list[int]:
    """Write rows as the blocks of one Arrow file; returns the number of rows in each."""
    counts, rows = list[int](), iter(todo)
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, schema) as writer:
        while block := list(islice(rows, block_rows)):
            writer.write_batch(pa.RecordBatch.from_pylist(block, schema=schema))
            counts.append(len(block))
    return counts


def read_block(path: str, number: int) -> list[pa.Table]:
    """One block of the file, as a Ray Data read task gives it."""
    with pa.memory_map(path) as source:
        return [pa.Table.from_batches([pa.ipc.open_file(source).get_batch(number)])]


def _dataset(path: Path, counts: list[int]) -> Any:
    import ray
    from ray.data import Datasource, ReadTask, TaskPoolStrategy
    from ray.data.block import BlockMetadata

    block_bytes = max(1, path.stat().st_size // len(counts))

    class Blocks(Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> int:
            return block_bytes * len(counts)

        def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[Any]:
            return [
                ReadTask(
                    partial(read_block, str(path), number),
                    BlockMetadata(num_rows=rows, size_bytes=block_bytes, input_files=None, exec_stats=None),
                )
                for number, rows in enumerate(counts)
            ]

    # A whole CPU for reading a block would starve the engines on a small machine; so would a process for each block.
    return ray.data.read_datasource(
        Blocks(),
        num_cpus=0.05,
        compute=TaskPoolStrategy(size=min(READERS, len(counts))),
        override_num_blocks=len(counts),
    )


def _in_time(dataset: Any, sink: Callable[[list[Row]], object]) -> Iterator[int]:
    """Hand results to the sink once a second has passed, and whatever is there when the pipeline ends or fails."""
    held, kept = list[Row](), time.monotonic()
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            held.extend(batch.to_pylist())
            if time.monotonic() - kept >= KEEP_EVERY_S:
                sink(held)
                yield len(held)
                held, kept = [], time.monotonic()
    finally:
        if held:
            sink(held)
    yield len(held)
