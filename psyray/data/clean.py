"""One chunk of raw speeches cleaned: scrubbed, measured, flagged, and signed for the search for near-duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from psyray import crisis
from psyray.data.dedup import band_hashes, tokens, word_pairs
from psyray.data.scrub import KINDS, Scrub, scrubber
from psyray.files import write_parquet
from psyray.records import MESSAGES, Message, Row, content_id, conversation_id, normalise, speech_id, table
from psyray.sections.data import SpeechesSection

ROLES = {"system", "user", "assistant"}
# Which of two equal or nearly equal speeches stays: a lower rank before a higher, then the lower id.
EXCLUDED, FORCED_TEST, ORDINARY = 0, 1, 2

RAW = pa.schema(
    [
        ("row", pa.int64()),
        ("source", pa.string()),
        ("messages", MESSAGES),
        ("topic", pa.string()),
        ("subtopic", pa.string()),
        ("side", pa.string()),
        ("excluded", pa.bool_()),
        ("repeats", pa.bool_()),
        ("answered", pa.bool_()),
    ]
)

CLEAN = pa.schema(
    [
        *RAW,
        ("speech_id", pa.string()),
        ("reason", pa.string()),  # why it is dropped; null where it stays
        ("rank", pa.int8()),
        ("place", pa.float64()),  # from 0 to 1 by hash; below speeches.test_share lies the test side
        ("crisis_kinds", pa.list_(pa.string())),
        *((kind, pa.int32()) for kind in KINDS),
        ("variant", pa.string()),  # differs between spellings with one id
        ("canon", pa.string()),  # the same for the same words
        ("pairs", pa.list_(pa.uint64())),
        ("bands", pa.list_(pa.uint64())),
    ]
)


def conversation(value: Any) -> list[Message] | None:
    """A text, or a list of messages that ends in the client's words; None for anything else."""
    if isinstance(value, str):
        return [{"role": "user", "content": value.strip()}] if value.strip() else None
    if not isinstance(value, list) or not value:
        return None
    fit = all(isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in value)
    if not fit or value[-1]["role"] != "user" or not value[-1]["content"].strip():
        return None
    return [{"role": m["role"], "content": m["content"].strip()} for m in value]


def scrubbed(messages: Sequence[Message], scrub: Scrub) -> tuple[list[Message], Counter[str]]:
    """The conversation without personal details, and how many there were of each kind."""
    counts: Counter[str] = Counter()
    cleaned = []
    for message in messages:
        text, found = scrub(message["content"])
        counts += found
        cleaned.append({"role": message["role"], "content": text})
    return cleaned, counts


def clean_row(raw: Row, section: SpeechesSection, scrub: Scrub) -> Row:
    """A RAW row as a CLEAN one."""
    messages, found = scrubbed(raw["messages"], scrub)
    key = speech_id(messages)
    client = [m["content"] for m in messages if m["role"] == "user"]
    kinds = crisis.kinds(*crisis.spoken((m["role"], m["content"]) for m in messages))
    words = tokens(" ".join(m["content"] for m in messages))
    reason = None if raw["excluded"] else _reason(client[-1], kinds, section)
    signed = section.near_duplicates is not None and reason is None
    pairs = word_pairs(words) if signed else None
    return raw | {
        "messages": messages,
        "speech_id": key,
        "reason": reason,
        "rank": _rank(raw, kinds, section),
        "place": int(content_id("split", conversation_id(key, messages, section.min_chars))[:8], 16) / 16**8,
        "crisis_kinds": kinds,
        **{kind: found[kind] for kind in KINDS},
        "variant": content_id(messages),
        "canon": content_id(words),
        "pairs": pairs,
        "bands": band_hashes(pairs, section.near_duplicates or 1.0) if pairs is not None else None,
    }


def _reason(last: str, kinds: Sequence[str], section: SpeechesSection) -> str | None:
    length = len(normalise(last))
    if length < section.min_chars:
        return "too short"
    if length > section.max_chars:
        return "too long"
    return "crisis" if kinds and section.crisis == "drop" else None


def _rank(raw: Row, kinds: Sequence[str], section: SpeechesSection) -> int:
    if raw["excluded"]:
        return EXCLUDED
    forced = raw["side"] == "test" or (bool(kinds) and section.crisis == "test_only")
    return FORCED_TEST if forced else ORDINARY


def cleaned_path(raw: Path) -> Path:
    """Where the cleaned rows of a file of raw ones lie."""
    return raw.with_name(raw.name.replace("raw", "clean"))


def clean_chunk(raw: Path, section: SpeechesSection) -> Path:
    """Clean a file of RAW rows into one of CLEAN rows beside it, and return its path; one that is there is kept."""
    done = cleaned_path(raw)
    if not done.exists():
        scrub = scrubber(section.scrub)
        rows = pq.read_table(raw).to_pylist()
        write_parquet(done, table((clean_row(row, section, scrub) for row in rows), CLEAN))
    return done
