"""The data contracts: what a row is, its id, and its Arrow schema.

Ids are content hashes, so a re-run makes the same ids, nothing is counted twice, and every join goes by id.
A failed row keeps its place with `status`, `error`, `raw_text` and `attempts`; no number is made up for it.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa

Row = dict[str, Any]
Message = dict[str, str]  # {"role": "user" | "assistant" | "system", "content": ...}


class Status(StrEnum):
    """The outcome of one generated or judged row."""

    OK = "ok"
    FAILED = "failed"  # the engine gave no answer
    INVALID = "invalid"  # it gave one that cannot be used


class Verdict(StrEnum):
    """Who won a comparison of response A with response B."""

    A = "A"
    B = "B"
    TIE = "tie"
    INVALID = "invalid"

    def swap(self) -> Verdict:
        """The same verdict with A and B exchanged."""
        return {Verdict.A: Verdict.B, Verdict.B: Verdict.A}.get(self, self)


def normalise(text: str) -> str:
    """Text with one Unicode form and single spaces: what ids and duplicate checks see."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def well_formed(text: str) -> str:
    """The text with U+FFFD for every lone surrogate: JSON may hold one, but UTF-8, so a file or an id, cannot."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def content_id(*parts: object) -> str:
    """A 16-digit hex id of the parts; equal parts give equal ids on every machine."""
    canonical = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_sum(path: Path) -> str:
    """The SHA-256 of what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_share(share: float, *parts: object) -> bool:
    """Whether the parts fall into a share of all, by their hash: the same on every machine."""
    return int(content_id(*parts), 16) < share * 16**16


def speech_id(messages: Sequence[Message]) -> str:
    """The id of a conversation that ends in the client's words."""
    return content_id("speech", [(m["role"], normalise(m["content"])) for m in messages])


def response_id(speech: str, responder: str, seed: int) -> str:
    """The id of one draw: known before the text is, so that a failed draw has a place."""
    return content_id("response", speech, responder, seed)


def conversation_id(speech: str, messages: Sequence[Message], least: int) -> str:
    """The id of the conversation that a speech is one length of: that of its shortest, which is one of its own.

    All lengths share the opening, up to the client's first words of `least` characters (`speeches.min_chars`).
    """
    client = (n for n, m in enumerate(messages) if m["role"] == "user" and len(normalise(m["content"])) >= least)
    opening = messages[: next(client, len(messages)) + 1]
    return speech if len(opening) == len(messages) else speech_id(opening)


def client_words(messages: Sequence[Message]) -> str:
    """The client's last words in a conversation."""
    return messages[-1]["content"]


@dataclass(frozen=True)
class Comparison:
    """A verdict between two responses to one speech."""

    speech_id: str
    a_id: str
    b_id: str
    verdict: Verdict
    margin: float = 0.0  # score(A) - score(B), in the judge's unit; 0 where there is none

    def swap(self) -> Comparison:
        """The same comparison seen from the other side; twice is the identity."""
        return replace(self, a_id=self.b_id, b_id=self.a_id, verdict=self.verdict.swap(), margin=-self.margin)


def compare(speech: str, a: tuple[str, float | None], b: tuple[str, float | None], tie_margin: float) -> Comparison:
    """The comparison that two pointwise scores imply; a missing score makes it invalid, never a number."""
    (a_id, a_score), (b_id, b_score) = a, b
    if a_score is None or b_score is None:
        return Comparison(speech, a_id, b_id, Verdict.INVALID)
    margin = a_score - b_score
    verdict = Verdict.TIE if abs(margin) <= tie_margin else Verdict.A if margin > 0 else Verdict.B
    return Comparison(speech, a_id, b_id, verdict, margin)


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_OUTCOME = [("status", pa.string()), ("error", pa.string()), ("raw_text", pa.string()), ("attempts", pa.int32())]

SPEECHES = pa.schema(
    [
        ("speech_id", pa.string()),
        ("messages", MESSAGES),
        ("split", pa.string()),
        ("topic", pa.string()),
        ("subtopic", pa.string()),
        ("crisis", pa.bool_()),
        ("crisis_kinds", pa.list_(pa.string())),
        ("source", pa.string()),
        ("answered", pa.bool_()),  # responses come with it: none need to be drawn
    ]
)

RESPONSES = pa.schema(
    [
        ("response_id", pa.string()),
        ("speech_id", pa.string()),
        ("messages", MESSAGES),
        ("split", pa.string()),
        ("crisis", pa.bool_()),
        ("responder", pa.string()),
        ("model", pa.string()),
        ("seed", pa.int64()),
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("repeated", pa.float32()),
        *_OUTCOME,
    ]
)

JUDGEMENTS = pa.schema(
    [
        ("response_id", pa.string()),
        ("speech_id", pa.string()),
        ("crisis", pa.bool_()),
        ("judge", pa.string()),
        ("ratings", pa.map_(pa.string(), pa.float32())),
        ("score", pa.float32()),  # weighted mean of the ratings; null unless status is ok
        *_OUTCOME,
    ]
)

PAIRS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("speech_id", pa.string()),
        ("messages", MESSAGES),
        ("chosen_id", pa.string()),
        ("rejected_id", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_truncated", pa.bool_()),  # null where it is not known
        ("rejected_truncated", pa.bool_()),
        ("chosen_model", pa.string()),
        ("rejected_model", pa.string()),
        ("chosen_ratings", pa.map_(pa.string(), pa.float32())),
        ("rejected_ratings", pa.map_(pa.string(), pa.float32())),
        ("margin", pa.float32()),  # null where it is not known
        ("split", pa.string()),
        ("crisis", pa.bool_()),
        ("source", pa.string()),  # who labelled it: "judge", "oracle", "reward", "data set"
    ]
)


SIDE_COLUMNS = (  # of PAIRS, after its side, and of a response
    ("_id", "response_id"),
    ("", "text"),
    ("_truncated", "truncated"),
    ("_model", "model"),
    ("_ratings", "ratings"),
)


def pair_row(speech: Mapping[str, Any], chosen: Row, rejected: Row, *, margin: float | None, source: str) -> Row:
    """One preference pair; `chosen` and `rejected` are response rows, with `ratings` where a judge gave them."""
    return {
        "pair_id": content_id("pair", speech["speech_id"], chosen["response_id"], rejected["response_id"]),
        "speech_id": speech["speech_id"],
        "messages": speech["messages"],
        "split": speech["split"],
        "crisis": speech.get("crisis"),
        "margin": margin,
        "source": source,
        **{
            f"{side}{suffix}": row.get(field)
            for side, row in (("chosen", chosen), ("rejected", rejected))
            for suffix, field in SIDE_COLUMNS
        },
    }


def table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as an Arrow table with exactly the schema's columns; a missing column is null."""
    listed = list(rows)
    return pa.table({f.name: pa.array([r.get(f.name) for r in listed], type=f.type) for f in schema}, schema=schema)


def rows(arrow: pa.Table) -> list[Row]:
    """The table's rows, with Arrow maps as plain dicts."""
    maps = [f.name for f in arrow.schema if pa.types.is_map(f.type)]
    listed: list[Row] = arrow.to_pylist()
    for row in listed:
        row.update({name: dict(row[name]) for name in maps if row[name] is not None})
    return listed
