"""What people said: a set of comparisons that a small YAML file declares.

    name: my pairs
    path: pairs.csv                  # CSV, JSONL or Parquet; relative to this file, or to --data
    prompt: question                 # the column with the client's words, or several: the first that is filled
    pairwise:                        # or `tiers:`, or `votes:`
      a: answer_1
      b: answer_2
      annotators: [anna, ben]        # columns that say A, B or tie; an empty cell: not asked

`configs/agreement/` holds one of each kind. A set is read into memory: people label thousands, not millions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Self

import duckdb
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from psyray.data.clean import conversation
from psyray.data.sources import cell, json_lines
from psyray.errors import PsyrayError
from psyray.records import Message, Row, Verdict, content_id, normalise, speech_id
from psyray.sections.data import Section

WORDS = {"A": Verdict.A, "B": Verdict.B, "tie": Verdict.TIE}
READERS = {
    ".csv": "read_csv(?, header=true, all_varchar=true, delim=',', quote='\"', escape='\"')",
    ".parquet": "read_parquet(?)",
}
JSON_LINES = (".jsonl", ".ndjson")


class Tiers(Section):
    """Columns of responses by quality; every response of a higher tier should beat every one of a lower."""

    columns: dict[str, list[str]] = Field(description="tier: its columns; the best tier first")
    strata: list[str] = Field(default_factory=list, description="which tiers meet, as hq>mq; none: all")

    @model_validator(mode="after")
    def tiers_can_meet(self) -> Self:
        if len(self.columns) < 2:
            raise ValueError("give two tiers at least, the best first")
        names = list(self.columns)
        known = {f"{high}>{low}" for high, low in combinations(names, 2)}
        for stratum in self.strata:
            if re.sub(r"\s", "", stratum) not in known:
                raise ValueError(f"no stratum {stratum!r}; one of {', '.join(sorted(known))}")
        return self

    def meetings(self) -> Iterator[tuple[str, str]]:
        """(higher tier, lower tier) of every stratum."""
        wanted = {re.sub(r"\s", "", stratum) for stratum in self.strata}
        for high, low in combinations(self.columns, 2):
            if not wanted or f"{high}>{low}" in wanted:
                yield high, low


class Pairwise(Section):
    """Two responses a row, and a column for each person who said which is better."""

    a: str
    b: str
    annotators: list[str] = Field(min_length=1)
    words: dict[str, Verdict] = Field(WORDS, validate_default=True, description="cell: A, B or tie")
    stratum: str | None = Field(None, description="a column that names the stratum")

    @field_validator("words")
    @classmethod
    def words_are_verdicts(cls, value: dict[str, Verdict]) -> dict[str, Verdict]:
        if Verdict.INVALID in value.values():
            raise ValueError("a word stands for A, B or tie; leave a cell empty where there is no verdict")
        return {normalise(word).lower(): verdict for word, verdict in value.items()}


class Votes(Section):
    """One response a row with its votes; of two to one prompt the one with more is better: a weak label."""

    group: str = Field(description="the column whose equal values share a prompt")
    response: str
    count: str
    gap: int = Field(2, ge=1, description="votes that two responses must lie apart")


class Join(Section):
    """Another table whose columns are added to every row, by an id column of both."""

    path: Path
    key: str


class LabelledSet(Section):
    name: str = Field(pattern=r"^[\w.-]+$", description="part of the folder that the figures go to")
    path: Path
    prompt: str | list[str]
    join: Join | None = None
    tiers: Tiers | None = None
    pairwise: Pairwise | None = None
    votes: Votes | None = None

    @model_validator(mode="after")
    def is_of_one_kind(self) -> Self:
        if sum(kind is not None for kind in (self.tiers, self.pairwise, self.votes)) != 1:
            raise ValueError("give exactly one of tiers, pairwise and votes")
        return self


@dataclass(frozen=True)
class Labelled:
    """Two responses to one conversation and what people said of them."""

    speech_id: str
    messages: list[Message]
    a: str
    b: str
    stratum: str
    human: Verdict  # A, B or tie
    annotators: Mapping[str, Verdict] = field(default_factory=dict)  # of those who were asked

    @property
    def comparison_id(self) -> str:
        """The same for the same texts in the same stratum, whichever is called A."""
        return content_id("labelled", self.speech_id, sorted((self.a, self.b)), self.stratum)

    def swap(self) -> Labelled:
        """The same comparison with A and B exchanged; twice is the identity."""
        annotators = {name: verdict.swap() for name, verdict in self.annotators.items()}
        return Labelled(
            self.speech_id, self.messages, self.b, self.a, self.stratum, self.human.swap(), annotators
        )  # fmt: skip


def load_labelled(path: Path, data: Path | None = None) -> tuple[LabelledSet, list[Labelled], dict[str, int]]:
    """The declared set, its comparisons in the order of their ids, and what was left out and why.

    Relative paths in the file start from `data`, else from the file's own folder. PsyrayError names file, row,
    column or key; never a cell's text.
    """
    declared = read_declaration(path)
    base = data or path.parent
    rows = read_rows(base / declared.path)
    if declared.join:
        rows = _joined(rows, base / declared.path, base / declared.join.path, declared.join.key)
    _check_columns(rows, declared, base / declared.path)
    dropped: Counter[str] = Counter()
    found: dict[str, Labelled] = {}
    for item in _comparisons(rows, declared, base / declared.path, dropped):
        reason = "same text twice" if item.a == item.b else "duplicate" if item.comparison_id in found else None
        if reason:
            dropped[reason] += 1
        else:
            found[item.comparison_id] = item
    if not found:
        raise PsyrayError(f"{base / declared.path} holds no comparison ({dict(dropped)}); check {path}")
    return declared, [found[key] for key in sorted(found)], dict(dropped)


def read_declaration(path: Path) -> LabelledSet:
    """The set that a YAML file declares; PsyrayError names the key."""
    if not path.is_file():
        raise PsyrayError(f"no labelled set at {path}; see configs/agreement/ for examples")
    try:
        return LabelledSet.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise PsyrayError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise PsyrayError(f"{path}: {said}") from None


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV (all cells text), JSONL or Parquet file; an empty cell is None."""
    if not path.is_file():
        raise PsyrayError(f"no file at {path}; --data names the folder that a labelled set's paths start from")
    if path.suffix.lower() in JSON_LINES:
        # Not by DuckDB: it refuses a lone surrogate, and makes dates of texts that look like one.
        listed = list(json_lines(path))
        empty = dict.fromkeys(name for row in listed for name in row)
        return [empty | row for row in listed]
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise PsyrayError(f"{path}: a labelled set comes as {', '.join(sorted((*JSON_LINES, *READERS)))}")
    try:
        found = duckdb.execute(f"SELECT * FROM {reader}", [str(path)])
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    except duckdb.Error as error:
        line = re.search(r"[Ll]ine:? (\d+)", str(error))  # the rest of the message holds the cell
        where = f" (line {line[1]})" if line else ""
        raise PsyrayError(f"{path} cannot be read as {path.suffix.lower()}{where}: {type(error).__name__}") from None


def consensus(verdicts: Sequence[Verdict]) -> Verdict:
    """What most say; a tie where two verdicts lead together."""
    counts = Counter(verdicts).most_common(2)
    if len(counts) == 2 and counts[0][1] == counts[1][1]:
        return Verdict.TIE
    return counts[0][0]


def _joined(rows: list[Row], path: Path, other: Path, key: str) -> list[Row]:
    others = read_rows(other)
    for side, listed, setting in ((other, others, "join.path"), (path, rows, "path")):
        if not listed:
            raise PsyrayError(f"{side} holds no rows ({setting})")
        if key not in listed[0]:
            raise PsyrayError(f"{side} has no column {key!r} (join.key)")
    by_id = {row[key]: row for row in others}
    return [by_id.get(row[key], dict.fromkeys(others[0])) | row for row in rows]


def _prompt_columns(declared: LabelledSet) -> list[str]:
    return [declared.prompt] if isinstance(declared.prompt, str) else list(declared.prompt)


def _check_columns(rows: Sequence[Row], declared: LabelledSet, path: Path) -> None:
    wanted = _prompt_columns(declared)
    if declared.tiers:
        wanted += [column for columns in declared.tiers.columns.values() for column in columns]
    if declared.pairwise:
        pairwise = declared.pairwise
        wanted += [pairwise.a, pairwise.b, *pairwise.annotators, *filter(None, [pairwise.stratum])]
    if declared.votes:
        wanted += [declared.votes.group, declared.votes.response, declared.votes.count]
    if not rows:
        raise PsyrayError(f"{path} holds no rows")
    if missing := [column for column in wanted if column not in rows[0]]:
        raise PsyrayError(f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(rows[0])}")


def _comparisons(rows: list[Row], declared: LabelledSet, path: Path, dropped: Counter[str]) -> Iterator[Labelled]:
    asked = []
    for number, row in enumerate(rows, 1):
        messages = _messages(row, _prompt_columns(declared), f"{path}, row {number}")
        if messages is None:
            dropped["no prompt"] += 1
        else:
            asked.append((number, messages, row))
    if declared.tiers:
        yield from _of_tiers(asked, declared.tiers, dropped)
    elif declared.pairwise:
        yield from _of_pairs(asked, declared.pairwise, path, dropped)
    elif declared.votes:
        yield from _of_votes(asked, declared.votes, path, dropped)


Asked = tuple[int, list[Message], Row]  # row number from 1, the conversation, the row


def _messages(row: Row, columns: Sequence[str], where: str) -> list[Message] | None:
    """The conversation in the first filled column; None where that holds none, as a speech's column may hold one."""
    for column in columns:
        value = row[column].strip() if isinstance(row[column], str) else row[column]
        if value:
            return conversation(cell(column, value, where))
    return None


def _text(row: Row, column: str, dropped: Counter[str]) -> str | None:
    value = row[column]
    if isinstance(value, str) and value.strip():
        return value.strip()
    dropped["no response"] += 1
    return None


def _better(messages: list[Message], better: str, worse: str, stratum: str) -> Labelled:
    """The better one is A or B by hash: who always says A must not look right."""
    item = Labelled(speech_id(messages), messages, better, worse, stratum, Verdict.A)
    return item.swap() if content_id(better) > content_id(worse) else item


def _of_tiers(asked: Sequence[Asked], tiers: Tiers, dropped: Counter[str]) -> Iterator[Labelled]:
    for _, messages, row in asked:
        texts = {
            tier: [text for column in columns if (text := _text(row, column, dropped))]
            for tier, columns in tiers.columns.items()
        }
        for high, low in tiers.meetings():
            for better in texts[high]:
                yield from (_better(messages, better, worse, f"{high}>{low}") for worse in texts[low])


def _of_pairs(asked: Sequence[Asked], pairs: Pairwise, path: Path, dropped: Counter[str]) -> Iterator[Labelled]:
    for number, messages, row in asked:
        said = {
            name: _word(row[name], pairs.words, f"{path}, row {number}, column {name!r}") for name in pairs.annotators
        }
        annotators = {name: verdict for name, verdict in said.items() if verdict is not None}
        a, b = _text(row, pairs.a, dropped), _text(row, pairs.b, dropped)
        if not annotators:
            dropped["nobody labelled it"] += 1
        elif a and b:
            stratum = str(row[pairs.stratum] or "none") if pairs.stratum else "all"
            human = consensus(list(annotators.values()))
            yield Labelled(speech_id(messages), messages, a, b, stratum, human, annotators)


def _word(cell: object, words: Mapping[str, Verdict], where: str) -> Verdict | None:
    word = normalise(str(cell)).lower() if cell is not None else ""
    if word and word not in words:
        raise PsyrayError(f"{where} holds none of {', '.join(words)}; mend the cell or set pairwise.words")
    return words.get(word)


def _of_votes(asked: Sequence[Asked], votes: Votes, path: Path, dropped: Counter[str]) -> Iterator[Labelled]:
    groups: dict[str, list[tuple[list[Message], str, int]]] = {}
    for number, messages, row in asked:
        text, count = _text(row, votes.response, dropped), str(row[votes.count])
        if not re.fullmatch(r"-?\d+", count):
            raise PsyrayError(f"{path}, row {number}, column {votes.count!r} is no whole number of votes")
        if text:
            groups.setdefault(str(row[votes.group]), []).append((messages, text, int(count)))
    for rated in groups.values():
        for (messages, better, up), (_, worse, down) in combinations(sorted(rated, key=lambda r: -r[2]), 2):
            if up - down >= votes.gap:
                yield _better(messages, better, worse, f"{votes.gap} votes apart")
