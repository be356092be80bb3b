"""Client speeches from a file: read, validated, filtered, de-duplicated and split.

psyray run configs/demo.yaml speeches.path=questions.jsonl speeches.text_column=questionText
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.lib
import pyarrow.parquet as pq

from psyray import crisis
from psyray.config import ASSETS, SpeechesSection
from psyray.errors import PsyrayError
from psyray.records import SPEECHES, Message, Row, content_id, normalise, speech_id
from psyray.run import Artifact, Folder, Run

SHIPPED = ASSETS / "speeches.jsonl"
TEXT_COLUMNS = ("messages", "text", "speech", "questiontext", "question", "prompt", "client", "content", "post")
ROLES = {"system", "user", "assistant"}


def speeches_stage(run: Run, section: SpeechesSection) -> Artifact:
    """The stage `speeches`: rows of SPEECHES and counts of what was dropped and why."""
    path = Path(section.path).expanduser() if section.path else SHIPPED
    source = read_file(path)

    def make(folder: Folder) -> Mapping[str, Any]:
        kept, dropped = select(source, section, path)
        parts = folder.parts(SPEECHES, "speech_id")
        parts.append(kept)
        parts.finish()
        splits = Counter(row["split"] for row in kept)
        return {
            "read": len(source),
            "kept": len(kept),
            "train": splits["train"],
            "test": splits["test"],
            "dropped": dict(dropped),
            "crisis": sum(row["crisis"] for row in kept),
        }

    # The text decides, not the path: a copy of the file elsewhere is the same input.
    config = section.model_dump(mode="json", exclude={"path"}) | {"source": content_id(source)}
    return run.stage("speeches", config, [], make)


def read_file(path: Path) -> list[Row]:
    """The rows of a JSONL, CSV or Parquet file; PsyrayError names the file, and the line of a malformed row."""
    if not path.exists():
        raise PsyrayError(f"no file of client speeches at {path} (speeches.path)")
    readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise PsyrayError(
            f"{path}: speeches come as .jsonl, .csv or .parquet, not {path.suffix or 'without an ending'}"
        )
    if path.stat().st_size == 0:
        raise PsyrayError(f"{path} is empty")
    try:
        found = readers[path.suffix.lower()](path)
    except (pa.lib.ArrowInvalid, UnicodeDecodeError) as error:
        raise PsyrayError(f"{path} cannot be read: {error}") from error
    if not found:
        raise PsyrayError(f"{path} holds no rows")
    return found


def _read_jsonl(path: Path) -> list[Row]:
    found = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise PsyrayError(f"{path}, line {number} is not JSON ({error.msg}); mend or remove it") from error
            if not isinstance(row, dict):
                raise PsyrayError(f"{path}, line {number} is no JSON object; mend or remove it")
            found.append(row)
    return found


def _read_csv(path: Path) -> list[Row]:
    quoted = pa.csv.ParseOptions(newlines_in_values=True)
    rows: list[Row] = pa.csv.read_csv(path, parse_options=quoted).to_pylist()
    return rows


def _read_parquet(path: Path) -> list[Row]:
    rows: list[Row] = pq.read_table(path).to_pylist()
    return rows


def text_column(rows: list[Row], wanted: str | None, path: Path) -> str:
    """The column with the client's words: the one that is named, else the first recognised one."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if wanted:
        if wanted not in columns:
            raise PsyrayError(f"{path} has no column {wanted!r} (speeches.text_column); it has {', '.join(columns)}")
        return wanted
    lowered = {name.lower(): name for name in reversed(columns)}
    for name in TEXT_COLUMNS:
        if name in lowered:
            return lowered[name]
    raise PsyrayError(f"{path}: no text column recognised among {', '.join(columns)}; set speeches.text_column")


def select(source: list[Row], section: SpeechesSection, path: Path) -> tuple[list[Row], Counter[str]]:
    """The speeches that stay, in the order of their ids, and why the others do not."""
    column = text_column(source, section.text_column, path)
    dropped: Counter[str] = Counter()
    kept: dict[str, Row] = {}
    for messages, row in _conversations(source, column, dropped):
        length = len(normalise(messages[-1]["content"]))
        key = speech_id(messages)
        reason = (
            "too short" if length < section.min_chars
            else "too long" if length > section.max_chars
            else "duplicate" if key in kept
            else None
        )  # fmt: skip
        if reason:
            dropped[reason] += 1
        else:
            kept[key] = _speech(key, messages, row, section.test_share)
    chosen = [kept[key] for key in sorted(kept)[: section.limit]]
    if over := len(kept) - len(chosen):
        dropped["over speeches.limit"] = over
    _check(chosen, dropped, path, section)
    return chosen, dropped


def _conversations(source: list[Row], column: str, dropped: Counter[str]) -> Iterator[tuple[list[Message], Row]]:
    for row in source:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            yield [{"role": "user", "content": value.strip()}], row
        elif isinstance(value, list) and _is_conversation(value):
            yield [{"role": m["role"], "content": m["content"].strip()} for m in value], row
        else:
            dropped["no text"] += 1


def _is_conversation(value: list[Any]) -> bool:
    return (
        bool(value)
        and all(isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in value)
        and value[-1]["role"] == "user"
        and bool(value[-1]["content"].strip())
    )


def _speech(key: str, messages: list[Message], row: Row, test_share: float) -> Row:
    # By hash, so that a speech keeps its side when others are added.
    test = int(content_id("split", key)[:8], 16) / 16**8 < test_share
    return {
        "speech_id": key,
        "messages": messages,
        "split": "test" if test else "train",
        "topic": str(row.get("topic") or ""),
        "subtopic": str(row.get("subtopic") or ""),
        "crisis": any(crisis.flag(m["content"]) for m in messages if m["role"] == "user"),
    }


def _check(kept: list[Row], dropped: Counter[str], path: Path, section: SpeechesSection) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none dropped"
    if not kept:
        limits = f"{section.min_chars} to {section.max_chars} characters"
        raise PsyrayError(f"{path}: no speech is left ({reasons}; kept are those of {limits})")
    for split in ("train", "test"):
        if not any(row["split"] == split for row in kept):
            raise PsyrayError(
                f"{path}: {len(kept)} speeches are left and none of them falls to {split} ({reasons}); "
                "give more speeches or another speeches.test_share"
            )
