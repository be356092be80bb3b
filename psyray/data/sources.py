"""Where client speeches come from: JSONL, CSV, Parquet, and Hugging Face data sets on disk or on the hub.

A source is read in batches and only the columns that matter are taken, so that its size does not matter. The hub is
asked only for a path that says so: `hf://owner/name`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.lib
import pyarrow.parquet as pq

from psyray.errors import PsyrayError
from psyray.records import Row, content_id, file_sum, well_formed
from psyray.sections.data import SourceSection

HUB = "hf://"
BATCH = 2_000
TEXT_COLUMNS = ("messages", "text", "speech", "questiontext", "question", "prompt", "client", "content", "post")
CSV_BLOCK = 8 * 2**20  # bytes; a row must fit into one


@dataclass(frozen=True)
class Opened:
    """A source whose columns are known; `read` gives batches of rows that hold the wanted ones where they have them."""

    columns: list[str]
    read: Callable[[Sequence[str]], Iterator[list[Row]]]


@dataclass(frozen=True)
class Layout:
    """Which columns of a source mean what; `repeats`: a speech has several rows, one for each answer or pair."""

    text: str
    topic: str | None
    subtopic: str | None
    repeats: bool

    @property
    def columns(self) -> list[str]:
        """The columns that a speech is made of."""
        return [name for name in (self.text, self.topic, self.subtopic) if name]


def identity(source: SourceSection) -> str:
    """Changes with the source's content, not with where a file lies; a hub data set stands for its commit."""
    if source.path.startswith(HUB):
        return content_id("hub", source.path, source.subset, source.split, _commit(source))
    path = existing(source)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digests = [(str(p.relative_to(path)) if path.is_dir() else "", file_sum(p)) for p in files]
    return content_id("files", digests, source.subset, source.split)


def _commit(source: SourceSection) -> str:
    if source.revision and re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return source.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        found = HfApi().dataset_info(source.path.removeprefix(HUB), revision=source.revision)
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:  # no such one, no access, no network
        raise PsyrayError(
            f"{source.path}: the hub gives no such data set ({type(error).__name__}); check the id, log in with "
            "HF_TOKEN if it is gated, or give a local copy's path"
        ) from error
    return str(found.sha)


def existing(source: SourceSection) -> Path:
    """The file or folder of a source that is no hub data set; PsyrayError names the setting where there is none."""
    path = Path(source.path).expanduser()
    if not path.exists():
        hint = "" if "/" not in source.path or path.suffix else f"; a hub data set is written {HUB}{source.path}"
        own = source.name in ("path", "exclude")
        named = f"speeches.{source.name}" if own else f"speeches.sources, {source.name}"
        raise PsyrayError(f"no file of client speeches at {path} ({named}){hint}")
    return path


def open_source(source: SourceSection) -> Opened:
    """The source's columns and a way to its rows; PsyrayError names the file, and the line of a malformed row."""
    opened = _open(source)

    def read(columns: Sequence[str]) -> Iterator[list[Row]]:
        talks = [name for name in columns if _may_hold_json(name)]
        return _unpacked(opened.read(columns), talks, source.path) if talks else opened.read(columns)

    return Opened(opened.columns, read)


def _unpacked(batches: Iterator[list[Row]], columns: Sequence[str], path: str) -> Iterator[list[Row]]:
    number = count(1)
    for batch in batches:
        for row, n in zip(batch, number, strict=False):
            row |= {name: cell(name, row[name], f"{path}, row {n}") for name in columns if name in row}
        yield batch


def _may_hold_json(column: str) -> bool:
    return column.lower() == "messages"


def cell(column: str, value: Any, where: str) -> Any:
    """A column's value; in one named `messages` a text that begins with `[` is a conversation as JSON.

    PsyrayError names `where` if it is not, and does not quote it.
    """
    if not _may_hold_json(column) or not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parsed(value)
    except (ValueError, RecursionError):
        raise PsyrayError(
            f"{where}, column {column!r} begins with [ but is not JSON; write the conversation as "
            '[{"role": "user", "content": "..."}], or give the column another name if it holds plain texts'
        ) from None


def _open(source: SourceSection) -> Opened:
    if source.path.startswith(HUB):
        return _open_data_set(source, source.path.removeprefix(HUB))
    path = existing(source)
    if path.is_dir():
        return _open_data_set(source, str(path))
    openers = {".jsonl": _open_jsonl, ".ndjson": _open_jsonl, ".csv": _open_csv, ".parquet": _open_parquet}
    if path.suffix.lower() not in openers:
        ending = path.suffix or "without an ending"
        raise PsyrayError(f"{path}: speeches come as .jsonl, .csv or .parquet, not {ending}")
    if path.stat().st_size == 0:
        raise PsyrayError(f"{path} is empty")
    opened = _explained(path, openers[path.suffix.lower()], path)
    if not opened.columns:
        raise PsyrayError(f"{path} holds no rows")

    def read(columns: Sequence[str]) -> Iterator[list[Row]]:
        batches = opened.read(columns)
        while batch := _explained(path, next, batches, None):
            yield batch

    return Opened(opened.columns, read)


def _explained(path: Path, act: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return act(*arguments)
    except pa.lib.ArrowInvalid as error:
        # Arrow quotes the row that it cannot read: what a client wrote.
        said = re.match(r".*?Expected \d+ columns, got \d+", str(error), re.DOTALL)
        mend = "; save it as UTF-8" if "invalid UTF8" in str(error) else ""
        raise PsyrayError(f"{path} cannot be read: {said.group() if said else error}{mend}") from None


def _open_jsonl(path: Path) -> Opened:
    def read(columns: Sequence[str]) -> Iterator[list[Row]]:
        return _batched({name: row[name] for name in columns if name in row} for row in json_lines(path))

    return Opened(list(dict.fromkeys(name for row in islice(json_lines(path), BATCH) for name in row)), read)


def json_lines(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file; PsyrayError names the file and the line of what is none."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_object(path, number, line)
    except UnicodeDecodeError as error:
        raise PsyrayError(f"{path} cannot be read: {error}") from None


def parsed(text: str) -> Any:
    """What a JSON text says, with U+FFFD for lone surrogates: one of them must not stop a whole set."""
    value = json.loads(text)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        value = json.loads(well_formed(json.dumps(value, ensure_ascii=False)))
    return value


def _json_object(path: Path, number: int, line: str) -> Row:
    try:
        row = parsed(line)
    except json.JSONDecodeError as error:
        raise PsyrayError(f"{path}, line {number} is not JSON ({error.msg}); mend or remove it") from None
    if not isinstance(row, dict):
        raise PsyrayError(f"{path}, line {number} is no JSON object; mend or remove it")
    return row


def _batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH)):
        yield batch


def _open_csv(path: Path) -> Opened:
    parse = pa.csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True)
    # One thread, which knows the number of a row that it cannot read.
    block = pa.csv.ReadOptions(block_size=CSV_BLOCK, use_threads=False)
    with pa.csv.open_csv(path, read_options=block, parse_options=parse) as table:
        names = list(table.schema.names)

    def read(columns: Sequence[str]) -> Iterator[list[Row]]:
        # All is text: a type guessed from the first rows need not fit the last.
        as_text = pa.csv.ConvertOptions(include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string()))
        with pa.csv.open_csv(path, read_options=block, parse_options=parse, convert_options=as_text) as table:
            for batch in table:
                yield from _sliced(batch)

    return Opened(names, read)


def _delimiter(path: Path) -> str:
    """What stands between the names in a CSV file's first line: a comma, or as some spreadsheets have it ; or a tab."""
    with path.open("rb") as file:
        head = file.readline()
    return max((",", ";", "\t"), key=lambda mark: head.count(mark.encode()))


def _open_parquet(path: Path) -> Opened:
    def read(columns: Sequence[str]) -> Iterator[list[Row]]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, columns=list(columns)):
                yield batch.to_pylist()

    return Opened(list(pq.read_schema(path).names), read)


def _sliced(batch: pa.RecordBatch) -> Iterator[list[Row]]:
    for start in range(0, batch.num_rows, BATCH):
        yield batch.slice(start, BATCH).to_pylist()


def _open_data_set(source: SourceSection, name: str) -> Opened:
    parts = _data_set(source, name)
    first = next(iter(parts[0].take(1) if hasattr(parts[0], "take") else parts[0]), None)
    if first is None:
        raise PsyrayError(f"{source.path} holds no rows")

    def read(columns: Sequence[str]) -> Iterator[list[Row]]:
        for part in parts:
            for batch in part.select_columns(list(columns)).iter(BATCH):
                yield [dict(zip(columns, values, strict=True)) for values in zip(*map(batch.get, columns), strict=True)]

    return Opened(list(first), read)


def _data_set(source: SourceSection, name: str) -> list[Any]:
    """The wanted split, or all: streamed from files, or mapped into memory where `save_to_disk` wrote it."""
    import datasets

    saved = Path(name) / "dataset_dict.json", Path(name) / "state.json"
    try:
        if any(mark.exists() for mark in saved):
            found = datasets.load_from_disk(name)
            if source.split and isinstance(found, dict):
                found = found[source.split]
        else:
            commit = _commit(source) if source.path.startswith(HUB) else None
            found = datasets.load_dataset(name, source.subset, split=source.split, revision=commit, streaming=True)
    except (ValueError, KeyError, OSError) as error:  # unknown subset or split, no data files, no access
        raise PsyrayError(f"{source.path} cannot be read as a data set: {type(error).__name__} {error}") from error
    return list(found.values()) if isinstance(found, dict) else [found]


def layout(source: SourceSection, columns: Sequence[str]) -> Layout:
    """What the columns mean: as the source names them, else recognised; PsyrayError names a missing one.

    CounselChat (one row for each answer) and PsychoCounsel-Preference (one row for each pair) come as they are.
    """
    lowered = {name.lower(): name for name in reversed(columns)}
    setting = "speeches" if source.name == "path" else f"speeches.sources, {source.name}:"
    joined = "." if source.name == "path" else " "

    def named(wanted: str | None, field: str, known: Iterable[str]) -> str | None:
        if wanted and wanted not in columns:
            there = ", ".join(columns)
            raise PsyrayError(f"{source.path} has no column {wanted!r} ({setting}{joined}{field}); it has {there}")
        return wanted or next((lowered[name] for name in known if name in lowered), None)

    text = named(source.text_column, "text_column", TEXT_COLUMNS)
    if text is None:
        there = ", ".join(columns)
        raise PsyrayError(f"{source.path}: no text column recognised among {there}; set {setting}{joined}text_column")
    if source.use != "speeches" and not {"chosen", "rejected"} <= set(columns):
        raise PsyrayError(
            f"{source.path} is not in the layout of PsychoCounsel-Preference, so its use cannot be {source.use}: "
            "it needs the columns chosen and rejected"
        )
    return Layout(
        text,
        named(source.topic_column, "topic_column", ["topic"]),
        named(source.subtopic_column, "subtopic_column", ["subtopic"]),
        repeats={"chosen", "rejected"} <= set(lowered) or {"questiontext", "answertext"} <= set(lowered),
    )
