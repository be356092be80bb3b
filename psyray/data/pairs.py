"""Preference pairs from judged responses: the gap rule, and the column layout of PsychoCounsel-Preference."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from psyray.config import PairsSection
from psyray.errors import PsyrayError
from psyray.records import PAIRS, Message, Row, Status, compare, content_id, normalise, pair_row, speech_id
from psyray.rubric import Rubric
from psyray.run import Artifact, Folder, Run, write_parquet

if TYPE_CHECKING:
    from psyray.data.ready import Ready

LAYOUT = "psychocounsel.parquet"


def pairs_stage(
    run: Run,
    section: PairsSection,
    rubric: Rubric,
    responses: Artifact,
    judgements: Artifact,
    ready: Ready | None = None,
) -> Artifact:
    """The stage `pairs`: rows of PAIRS, the same in the published layout, and counts of what was left out.

    Pairs of a data set join those that the gap rule makes; rated responses of one go through the rule.
    """

    def make(folder: Folder) -> Mapping[str, Any]:
        judged = join(responses.rows(), judgements.rows()) + (ready.judged(rubric) if ready else [])
        built, dropped = build_pairs(judged, section, rubric)
        built += ready.pairs() if ready else []
        splits = Counter(row["split"] for row in built)
        if not splits["train"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "there were no responses"
            raise PsyrayError(
                f"no training pair is left ({reasons}): lower pairs.gap (now {section.gap}), "
                "draw more responses (responses.k, at least 2) or give more speeches"
            )
        parts = folder.parts(PAIRS, "pair_id")
        parts.append(built)
        parts.finish()
        write_parquet(folder.path / LAYOUT, to_layout(built, rubric.keys))
        return {"train": splits["train"], "test": splits["test"], "dropped": dict(dropped)}

    inputs = [responses, judgements, *([ready.artifact] if ready else [])]
    return run.stage("pairs", section.model_dump() | {"rubric": rubric.id}, inputs, make)


def join(responses: Iterable[Row], judgements: Iterable[Row]) -> list[Row]:
    """Usable responses with their usable ratings and score, joined by id."""
    by_id = {row["response_id"]: row for row in judgements if row["status"] == Status.OK}
    return [
        row | {"ratings": by_id[row["response_id"]]["ratings"], "score": by_id[row["response_id"]]["score"]}
        for row in responses
        if row["status"] == Status.OK and row["response_id"] in by_id
    ]


def build_pairs(judged: Sequence[Row], section: PairsSection, rubric: Rubric) -> tuple[list[Row], Counter[str]]:
    """The pairs that the rule makes, and why other candidates became none."""
    by_speech: dict[str, list[Row]] = defaultdict(list)
    for row in judged:
        by_speech[row["speech_id"]].append(row)
    built: list[Row] = []
    dropped: Counter[str] = Counter()
    for responses in by_speech.values():
        if len(responses) < 2:
            dropped["one response only"] += 1
            continue
        pairs = sorted(_of_speech(responses, section, rubric, dropped), key=lambda p: (-p["margin"], p["pair_id"]))
        kept = pairs[: section.max_per_speech]
        dropped["over pairs.max_per_speech"] += len(pairs) - len(kept)
        built.extend(kept)
    return built, +dropped


def _of_speech(responses: Sequence[Row], section: PairsSection, rubric: Rubric, dropped: Counter[str]) -> Iterator[Row]:
    times = sum(p.weight for p in rubric.principles) if section.gap_on == "total" else 1.0
    ordered = sorted(responses, key=lambda r: (r["score"], r["response_id"]))
    candidates = combinations(ordered, 2) if section.rule == "all" else [(ordered[0], ordered[-1])]
    by_id = {r["response_id"]: r for r in responses}
    for a, b in candidates:
        first, second = ((r["response_id"], r["score"] * times) for r in (a, b))
        # The gap is the least difference that makes a pair; just under it lies the tie.
        comparison = compare(a["speech_id"], first, second, section.gap - 1e-6)
        winner = comparison.chosen_rejected()
        if normalise(a["text"]) == normalise(b["text"]):
            dropped["same text"] += 1
        elif winner is None:
            dropped["gap too small"] += 1
        else:
            chosen, rejected = (by_id[key] for key in winner)
            yield pair_row(a, chosen, rejected, margin=abs(comparison.margin), source="judge")


def to_layout(pairs: Sequence[Row], keys: Sequence[str]) -> pa.Table:
    """Pairs in the columns of PsychoCounsel-Preference; ratings are rounded to whole numbers, as there."""
    number = {key: i for i, key in enumerate(sorted({p["speech_id"] for p in pairs}))}
    rows = []
    for pref_id, pair in enumerate(sorted(pairs, key=lambda p: (p["speech_id"], p["pair_id"]))):
        row: Row = {
            "ID": f"{number[pair['speech_id']]}",
            "prefID": pref_id,
            "question": pair["messages"][-1]["content"],
            **{name: pair[name] for name in ("chosen", "rejected", "chosen_model", "rejected_model")},
        }
        for side in ("chosen", "rejected"):
            ratings = pair[f"{side}_ratings"] or {}
            row |= {f"{side}_{key}_rating": round(ratings[key]) if key in ratings else None for key in keys}
        rows.append(row)
    text = [(name, pa.string()) for name in ("question", "chosen", "rejected", "chosen_model", "rejected_model")]
    rated = [(f"{side}_{key}_rating", pa.int64()) for side in ("chosen", "rejected") for key in keys]
    return pa.Table.from_pylist(rows, schema=pa.schema([("ID", pa.string()), ("prefID", pa.int64()), *text, *rated]))


def from_layout(row: Row, messages: list[Message], rubric: Rubric) -> Row:
    """The PAIRS row of one in the published layout, answering `messages`; its side of the split is still open.

    The margin is 0 where a rating is missing.
    """
    speech = {"speech_id": speech_id(messages), "messages": messages, "split": None}
    responses = []
    for side in ("chosen", "rejected"):
        rated = {key: row.get(f"{side}_{key}_rating") for key in rubric.keys}
        ratings = {key: float(value) for key, value in rated.items() if value not in (None, "")}
        key = content_id("response", speech["speech_id"], normalise(row[side]))
        model = row.get(f"{side}_model") or ""
        responses.append({"response_id": key, "text": row[side], "model": model, "ratings": ratings or None})
    chosen, rejected = responses
    margin = 0.0
    if all(len(r["ratings"] or {}) == len(rubric.keys) for r in responses):
        margin = rubric.score(chosen["ratings"]) - rubric.score(rejected["ratings"])
    return pair_row(speech, chosen, rejected, margin=margin, source="data set")
