"""The files of a run: each is whole or is not there, and rows are read a few thousand at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from psyray.errors import PsyrayError
from psyray.records import Row, rows

ROWS_IN_MEMORY = 4_096

MEND = "put a copy of it back, or move it away and give the run's command again, which writes it anew"


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place if the block ends well, and is gone if it does not."""
    # Not by `tempfile`: its files are for one account alone, and a run folder may be shared.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, also after a crash."""
    with draft(path) as beside, beside.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def batches(
    files: Iterable[Path], columns: Sequence[str] | None = None, rows: int = ROWS_IN_MEMORY
) -> Iterator[pa.RecordBatch]:
    """The rows of Parquet files, `rows` in memory at a time."""
    for path in files:
        # By default all of a file is read before its first row is given.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            yield from file.iter_batches(rows, columns=columns)


def each(files: Iterable[Path], columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of Parquet files as dicts, a few thousand in memory at a time."""
    for batch in batches(files, columns):
        yield from rows(pa.Table.from_batches([batch]))


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """What a JSON file of a run says; PsyrayError where it is broken or is no such file, since `keys` are missing."""
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise PsyrayError(f"{path} is no JSON ({error}); {MEND}") from error
    if not isinstance(tree, dict) or not tree.keys() >= set(keys):
        raise PsyrayError(f"{path} is none of psyray's: it does not say {', '.join(keys)}; {MEND}")
    return tree


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in RUN/config.yaml; PsyrayError where it is broken."""
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise PsyrayError(f"{path} is no YAML ({' '.join(str(error).split()):.200}); {MEND}") from error
    if not isinstance(tree, dict):
        raise PsyrayError(f"{path} holds no settings; {MEND}")
    return tree


def write_parquet(path: Path, arrow: pa.Table) -> None:
    """Write a Parquet file that exists only when it is whole."""
    with draft(path) as beside:
        pq.write_table(arrow, beside)
