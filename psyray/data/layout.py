"""The published column layout of PsychoCounsel-Preference (arXiv 2502.19731): pairs into it and back.

    ID, prefID, question, chosen, rejected, chosen_model, rejected_model, {chosen,rejected}_{principle}_rating

ID is the speech's id and prefID the first 60 bits of the pair's, so both are the same in every export. The question is
the client's last words; ratings are whole numbers, as there (halves go to the even neighbour). A model that was
loaded from a path goes by its folder's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from psyray.files import draft
from psyray.records import Message, Row, content_id, normalise, pair_row, speech_id
from psyray.rubric import Rubric
from psyray.tables import identifier, in_order, literal

SIDES = ("chosen", "rejected")
ROWS_PER_GROUP = 8192
UNUSABLE = "unusable ratings"  # cells that are filled, but with no number on the rubric's scale


def rating_columns(keys: Sequence[str]) -> list[str]:
    """The rating columns' names, in order."""
    return [f"{side}_{key}_rating" for side in SIDES for key in keys]


def model_name(column: str) -> str:
    """SQL for a model's name without the folders that it lay in."""
    path = f"{column}[1] IN ('/', '.', '~')"
    return f"CASE WHEN {path} THEN regexp_extract(rtrim({column}, '/'), '[^/]*$') ELSE {column} END"


def to_layout(keys: Sequence[str]) -> str:
    """The SELECT list that turns the columns of a table `pairs` of PAIRS into the published ones."""
    columns = {
        "ID": "pairs.speech_id",
        "prefID": "('0x' || left(pairs.pair_id, 15))::BIGINT",
        "question": "pairs.messages[-1].content",
        **{side: f"pairs.{side}" for side in SIDES},
        **{f"{side}_model": model_name(f"pairs.{side}_model") for side in SIDES},
        **{
            f"{side}_{key}_rating": f"round_even(pairs.{side}_ratings[{literal(key)}], 0)::BIGINT"
            for side in SIDES
            for key in keys
        },
    }
    return ", ".join(f"{value} AS {identifier(name)}" for name, value in columns.items())


def layout(database: duckdb.DuckDBPyConnection, keys: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of the view `pairs` of PAIRS in the published layout, by speech and pair."""
    return in_order(database, f"SELECT {to_layout(keys)} FROM pairs", ["ID", "prefID"], rows=ROWS_PER_GROUP)


def write_batches(path: Path, stream: Iterable[pa.RecordBatch]) -> None:
    """Write a Parquet file that exists only when it is whole; none where there are no rows."""
    batches = iter(stream)
    if (first := next(batches, None)) is None:
        return
    with draft(path) as beside, pq.ParquetWriter(beside, first.schema) as writer:
        for batch in chain([first], batches):
            writer.write_batch(batch)


def from_layout(row: Row, messages: list[Message], rubric: Rubric, counts: Counter[str] | None = None) -> Row:
    """The PAIRS row of one in the published layout, answering `messages`; its side of the split is still open.

    A rating that cannot be used is missing, and counted in `counts`. There is no margin where a rating is missing.
    """
    speech = {"speech_id": speech_id(messages), "messages": messages, "split": None}
    responses = []
    for side in SIDES:
        given = {key: row.get(f"{side}_{key}_rating") for key in rubric.keys}
        given = {key: value for key, value in given.items() if not _blank(value)}
        ratings = {key: number for key, value in given.items() if (number := _rating(value, rubric)) is not None}
        if counts is not None and len(ratings) < len(given):
            counts[UNUSABLE] += len(given) - len(ratings)
        key = content_id("response", speech["speech_id"], normalise(row[side]))
        model = row.get(f"{side}_model") or ""
        responses.append({"response_id": key, "text": row[side], "model": model, "ratings": ratings or None})
    chosen, rejected = responses
    margin = None
    if all(len(r["ratings"] or {}) == len(rubric.keys) for r in responses):
        margin = rubric.score(chosen["ratings"]) - rubric.score(rejected["ratings"])
    return pair_row(speech, chosen, rejected, margin=margin, source="data set")


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _rating(value: Any, rubric: Rubric) -> float | None:
    """The number that a cell holds, as a number or as text; None where it holds none on the rubric's scale."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if rubric.low <= number <= rubric.high else None  # NaN is on no scale
