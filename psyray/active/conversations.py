"""Choices that people made as they talked to two policies (serve/compare.py): in the ledger, a kind of their own.

    keep(ledger, run_id, choice)      write one down, final at once
    tally(ledger, runs)               how often which policy was chosen
    write_pairs(ledger, runs, path)   the decided ones as pairs that a configuration may name

No round reads them by itself. They are pairs of a run only where somebody writes them to a file and names it as a
source of pairs (`speeches.sources`, docs/speeches.md) or as a labelled set (`oracle.path`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from psyray.active.database import CHARGE, QUESTION
from psyray.active.ledger import ANSWERED, Answer, Ledger, Question
from psyray.active.place import Place
from psyray.active.votes import Choice, Vote, consensus
from psyray.errors import PsyrayError
from psyray.files import draft
from psyray.in_words import people
from psyray.records import Message, Verdict, content_id

KIND, ORACLE, PURPOSE = "conversation", "people in conversation", "conversations"


@dataclass(frozen=True)
class Chosen:
    """One choice: A is the answer of the policy that stands first in `policies`, whichever side it was shown on."""

    turn_id: str
    who: str
    rubric: str
    messages: Sequence[Message]
    policies: tuple[str, str]
    texts: tuple[str, str]
    choice: Choice  # by side
    a_left: bool
    seconds: float  # from both answers being there to the choice
    scores_seen: bool  # whether the reward model's view was open before
    scores: Sequence[dict[str, Any]] | None = None
    note: str = ""


def keep(ledger: Ledger, run_id: str, chosen: Chosen) -> Vote:
    """Write the choice down for the run; what the ledger holds of the turn then, its first choice.

    LedgerError where it cannot.
    """
    payload = {
        "messages": list(chosen.messages),
        "a": chosen.texts[0],
        "b": chosen.texts[1],
        "a_policy": chosen.policies[0],
        "b_policy": chosen.policies[1],
    }
    key = content_id(KIND, chosen.turn_id, chosen.who, payload)
    ledger.reserve(run_id, PURPOSE, [Question(key, KIND, ORACLE, chosen.rubric, payload)], None)
    vote = chosen.choice.vote(chosen.a_left)
    verdict, margin = consensus([vote])
    said = {
        "verdict": verdict,
        "margin": margin,
        "vote": vote,
        "a_left": chosen.a_left,
        "scores_seen": chosen.scores_seen,
        "scores": chosen.scores,
        "note": chosen.note,
    }
    ledger.answer([Answer(key, ok=True, answer=said, latency_s=chosen.seconds, who=chosen.who)])
    held = ledger.answers([key])[key].answer or {}
    return Vote(held["vote"])


def kept(ledger: Ledger, runs: Collection[str]) -> Iterator[dict[str, Any]]:
    """The runs' choices in the order in which they came: payload, answer and `who` of each."""
    mine = sa.exists().where(CHARGE.c.question_id == QUESTION.c.question_id, CHARGE.c.run_id.in_(runs))
    wanted = (
        sa.select(QUESTION.c.payload, QUESTION.c.answer, QUESTION.c.who)
        .where(QUESTION.c.kind == KIND, QUESTION.c.status == ANSWERED, mine)
        .order_by(QUESTION.c.answered_at, QUESTION.c.question_id)
    )
    with ledger.database.transaction(reading=True) as connection:
        for row in connection.execution_options(yield_per=1000).execute(wanted):
            yield json.loads(row.payload) | json.loads(row.answer) | {"who": row.who}


def tally(ledger: Ledger, runs: Collection[str]) -> list[dict[str, Any]]:
    """For each two policies: {policies, people, first, second, ties, harmful, scores_seen}; most choices first."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    who: dict[tuple[str, str], set[str]] = {}
    for row in kept(ledger, runs):
        both = row["a_policy"], row["b_policy"]
        counts.setdefault(both, Counter()).update([row["vote"], "all", *(["seen"] if row["scores_seen"] else [])])
        who.setdefault(both, set()).add(row["who"])
    found = [
        {
            "policies": list(both),
            "people": len(who[both]),
            "first": said["A"],
            "second": said["B"],
            "ties": said["tie"],
            "harmful": said["harmful"],
            "scores_seen": said["seen"],
        }
        for both, said in sorted(counts.items(), key=lambda item: (-item[1]["all"], item[0]))
    ]
    return found


def write_pairs(ledger: Ledger, runs: Collection[str], path: Path) -> int:
    """Write the decided choices as JSONL {messages, chosen, rejected, chosen_model, rejected_model}; their number."""
    count = 0
    with draft(path) as beside, beside.open("w") as out:
        for row in kept(ledger, runs):
            if row["verdict"] not in (Verdict.A, Verdict.B):
                continue
            won, lost = ("a", "b") if row["verdict"] == Verdict.A else ("b", "a")
            pair = {"messages": row["messages"], "chosen": row[won], "rejected": row[lost]}
            models = {"chosen_model": row[f"{won}_policy"], "rejected_model": row[f"{lost}_policy"]}
            out.write(json.dumps(pair | models, ensure_ascii=False) + "\n")
            count += 1
    return count


def show(place: Place, to: Path | None, say: Callable[[str], None]) -> None:
    """Tell the tally of a run's choices and, with `to`, write the pairs; PsyrayError where nobody has chosen yet."""
    ledger = Ledger(place.ledger)
    found = tally(ledger, place.runs)
    if not found:
        raise PsyrayError(
            f"nobody has chosen between two policies in {place.folder} yet; the page for that is the application "
            f"`compare` of configs/serve.yaml, with run: {place.folder}"
        )
    for row in found:
        first, second = row["policies"]
        say(
            f"{first} {row['first']}, {second} {row['second']}, ties {row['ties']}, harmful {row['harmful']}; "
            f"by {people(row['people'])}, {row['scores_seen']} after a look at the reward model's scores"
        )
    if to:
        say(f"{to}: {write_pairs(ledger, place.runs, to)} pairs")
    ledger.close()
