"""Sorts, joins and group-bys over Parquet that need not fit into memory: DuckDB, set up the same way everywhere.

    with connect(folder) as database:
        for batch in batches(database, "SELECT * FROM read_parquet($files) ORDER BY id", {"files": sources(paths)}):
            ...

Results are the same on every machine only under an ORDER BY that decides every tie. What DuckDB itself writes needs
`COPY … (FORMAT parquet, ROW_GROUP_SIZE 8192)`: its default pages of long texts take hundreds of MiB to read again.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

MEMORY_MIB = 512  # what DuckDB may hold before it spills; the driver's other needs come on top
THREADS = 2


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


def view(database: duckdb.DuckDBPyConnection, name: str, files: Iterable[Path]) -> None:
    """Name the rows of Parquet files, one file at least, so that queries read as if they were a table."""
    listed = ", ".join(literal(source) for source in sources(files))
    database.execute(f"CREATE OR REPLACE TEMP VIEW {identifier(name)} AS FROM read_parquet([{listed}])")


def batches(
    database: duckdb.DuckDBPyConnection, query: str, values: Mapping[str, Any] | None = None, rows: int = 8192
) -> Iterator[pa.RecordBatch]:
    """The query's result as it is made, up to `rows` rows at a time; `values` fill its `$name` marks.

    Unlike `execute`, which holds the whole result before the first row can be read.
    """
    yield from database.sql(query, params=values).to_arrow_reader(rows)
