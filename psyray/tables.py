"""Sorts, joins and group-bys over Parquet that need not fit into memory: DuckDB, set up the same way everywhere.

    with connect(folder) as database:
        for batch in in_order(database, "SELECT * FROM read_parquet($files)", ["id"], {"files": sources(paths)}):
            ...

Rows with texts are put in order by `in_order`, never by ORDER BY: DuckDB's merge holds 122,880 whole rows for each
thread, whatever its memory limit, and stops where they do not fit. What it writes itself needs `COPY … (FORMAT parquet,
ROW_GROUP_SIZE 8192)`, since its default pages of long texts take hundreds of MiB to read again.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

MEMORY_MIB = 512  # what DuckDB may hold before it spills; the driver's other needs come on top
THREADS = 2
ROWS_PER_BUCKET = 16_384  # what `in_order` sorts at a time


@contextmanager
def connect(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty in-memory database that spills into `folder`/.spill, removed at the end; one at a time for a folder."""
    spill = folder / ".spill"
    shutil.rmtree(spill, ignore_errors=True)  # of a process that was killed
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{MEMORY_MIB}MiB",
        "temp_directory": str(spill),
        "threads": THREADS,
        # Saves memory; what ORDER BY says still holds.
        "preserve_insertion_order": False,
        # Nothing is ever fetched from outside.
        "autoinstall_known_extensions": False,
    }
    try:
        with duckdb.connect(":memory:", config=settings) as database:
            yield database
    finally:
        shutil.rmtree(spill, ignore_errors=True)


def sources(files: Iterable[Path]) -> list[str]:
    """Paths as `read_parquet` takes them: brackets and stars in a folder's name stand for themselves."""
    return [glob.escape(str(file)) for file in files]


def literal(text: str) -> str:
    """A text as SQL spells it."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A column's name as SQL spells it."""
    return '"' + name.replace('"', '""') + '"'


def view(database: duckdb.DuckDBPyConnection, name: str, files: Iterable[Path], *, places: bool = False) -> None:
    """Name the rows of Parquet files, one file at least, so that queries read as if they were a table.

    With `places`, two columns more tell where a row lies: `filename` and `file_row_number`.
    """
    listed = ", ".join(literal(source) for source in sources(files))
    options = ", filename = true, file_row_number = true" if places else ""
    database.execute(f"CREATE OR REPLACE TEMP VIEW {identifier(name)} AS FROM read_parquet([{listed}]{options})")


def batches(
    database: duckdb.DuckDBPyConnection, query: str, values: Mapping[str, Any] | None = None, rows: int = 8192
) -> Iterator[pa.RecordBatch]:
    """The query's result as it is made, up to `rows` rows at a time; `values` fill its `$name` marks.

    Unlike `execute`, which holds the whole result before the first row can be read.
    """
    yield from database.sql(query, params=values).to_arrow_reader(rows)


def in_order(
    database: duckdb.DuckDBPyConnection,
    query: str,
    keys: Sequence[str],
    values: Mapping[str, Any] | None = None,
    rows: int = 8192,
) -> Iterator[pa.RecordBatch]:
    """The query's rows, by the columns `keys`, up to `rows` at a time; at most two buckets of rows are in memory.

    A distribution sort: the first key alone, which must not be null nor equal in most rows, sends each row to one of
    the buckets on disk; each bucket is then sorted by all keys.
    """
    (spill,) = database.execute("SELECT current_setting('temp_directory')").fetchall()[0]
    first = identifier(keys[0])
    bounds = database.execute(
        f"""SELECT DISTINCT key FROM (SELECT {first} AS key, row_number() OVER (ORDER BY {first}) AS n FROM ({query}))
        WHERE n % {ROWS_PER_BUCKET} = 0 ORDER BY key""",
        values,
    ).fetchall()
    Path(spill).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=spill) as folder:
        buckets = [Path(folder) / f"{number}.arrow" for number in range(len(bounds) + 1)]
        _distribute(batches(database, query, values, rows), keys[0], [key for (key,) in bounds], buckets)
        for bucket in buckets:
            if not bucket.exists():  # no rows at all
                return
            with pa.OSFile(str(bucket)) as source:
                held = pa.ipc.open_stream(source).read_all().combine_chunks()
            yield from held.sort_by([(key, "ascending") for key in keys]).to_batches(rows)
            bucket.unlink()


def _distribute(stream: Iterable[pa.RecordBatch], key: str, bounds: Sequence[Any], buckets: Sequence[Path]) -> None:
    """Write each row into the bucket that its key falls to: up to the first bound, up to the second, ..."""
    limits = np.array(bounds, dtype=object)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with ExitStack() as stack:
        writers: list[Any] = []
        for batch in stream:
            if not writers:
                files = [stack.enter_context(pa.OSFile(str(bucket), "wb")) for bucket in buckets]
                writers = [stack.enter_context(pa.ipc.new_stream(f, batch.schema, options=options)) for f in files]
            place = np.searchsorted(limits, np.array(batch[key].to_pylist(), dtype=object))
            order = np.argsort(place, kind="stable")
            batch, starts = batch.take(pa.array(order)), np.searchsorted(place[order], range(len(buckets) + 1))
            for number in np.unique(place):
                writers[number].write_batch(batch.slice(starts[number], starts[number + 1] - starts[number]))


def cut(stream: Iterable[pa.RecordBatch], rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The stream's batches with the number of the file that each goes into, cut where a file holds `rows` rows."""
    done = 0
    for batch in stream:
        while batch.num_rows:
            piece = batch.slice(0, rows - done % rows)
            yield done // rows, piece
            done += piece.num_rows
            batch = batch.slice(piece.num_rows)
