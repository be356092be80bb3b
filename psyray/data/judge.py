"""Judgements: each response rated once, every question in the label ledger before it is asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from psyray.active.ledger import Answer, Ledger, Question
from psyray.config import JudgeSection, PanelSection
from psyray.data.consensus import judges_agreement, panel_rows
from psyray.engines.judges import Judge
from psyray.errors import PsyrayError
from psyray.records import JUDGEMENTS, Row, Status, content_id
from psyray.rubric import Rubric
from psyray.run import Artifact, Folder, Run
from psyray.stream import stream


@dataclass(frozen=True)
class Desk:
    """Where ratings are bought: a judge, its rubric, the ledger, and the run that pays."""

    judge: Judge
    rubric: Rubric
    ledger: Ledger
    run_id: str
    section: JudgeSection
    members: tuple[Desk, ...] = ()  # of a panel: a desk for each judge, where its answers are bought
    panel: PanelSection = field(default_factory=PanelSection)

    @property
    def identity(self) -> dict[str, str]:
        """What stands for the desk in a fingerprint."""
        rated = {"judge": self.judge.id, "rubric": self.rubric.id}
        return rated | ({"pairwise": self.rubric.pairwise_id} if self.section.form == "pairwise" else {})


def judgements_stage(run: Run, desk: Desk, responses: Artifact) -> Artifact:
    """The stage `judgements`: every usable response rated by the rubric."""

    def make(folder: Folder) -> Mapping[str, Any]:
        judged = judge(folder, desk, responses.rows(), purpose="judgements", budget=desk.section.budget)
        folder.parts(JUDGEMENTS, "response_id").append(judged)
        folder.parts(JUDGEMENTS, "response_id").finish()
        usable = sum(row["status"] == Status.OK for row in responses.rows())
        return summary(judged, desk) | {"unjudged": usable - len(judged)}

    return run.stage("judgements", desk.identity | {"budget": desk.section.budget}, [responses], make)


def judge(folder: Folder, desk: Desk, responses: Sequence[Row], *, purpose: str, budget: int | None) -> list[Row]:
    """JUDGEMENTS rows of the usable responses, as many as the budget buys; answers known to the ledger are free.

    PsyrayError where more than `judge.max_invalid_share` of the answers cannot be used.
    """
    if desk.members:
        answered = [
            judge(folder, member, responses, purpose=f"{purpose}/{member.judge.id}", budget=budget)
            for member in desk.members
        ]
        judged = panel_rows(answered, desk.judge.id, desk.rubric, desk.panel)
        check_share(judged, desk.section.max_invalid_share)
        return judged
    usable = [row for row in responses if row["status"] == Status.OK]
    asked = {row["response_id"]: question(desk, row) for row in usable}
    unique = list({q.question_id: q for q in asked.values()}.values())
    reserved = desk.ledger.reserve(desk.run_id, purpose, unique, budget)
    ask(folder, desk, reserved.to_ask, title=purpose, done=len(reserved.answered))
    answers = desk.ledger.answers([q.question_id for q in unique])
    judged = [
        judgement(desk, row, answers[asked[row["response_id"]].question_id])
        for row in usable
        if asked[row["response_id"]].question_id in answers
    ]
    check_share(judged, desk.section.max_invalid_share)
    return judged


def question(desk: Desk, response: Row) -> Question:
    """The question `rate this response`; equal text under an equal conversation is an equal question."""
    payload = {"messages": response["messages"], "response": response["text"]}
    key = content_id("rating", desk.judge.id, desk.rubric.id, payload)
    return Question(key, "rating", desk.judge.id, desk.rubric.id, payload)


def ask(folder: Folder, desk: Desk, questions: Sequence[Question], *, title: str, done: int = 0) -> None:
    """Put the questions to the judge; each answer is in the ledger before the next batch is taken."""

    def keep(results: list[Row]) -> None:
        desk.ledger.answer(_answer(r, desk.judge.id) for r in results)

    todo = [{"key": q.question_id, **q.payload} for q in questions]
    stream(folder, todo, desk.judge.rate, keep, title=title, done=done)


def _answer(result: Row, who: str) -> Answer:
    ratings = json.loads(result["ratings"]) if result["ratings"] else None
    return Answer(
        result["key"],
        ok=ratings is not None,
        answer={"ratings": ratings, "raw_text": result["raw_text"]},
        error=result["error"],
        attempts=result["attempts"],
        latency_s=result["latency_s"],
        cost=result["cost"],
        who=who,
    )


def judgement(desk: Desk, response: Row, answer: Answer) -> Row:
    """The JUDGEMENTS row that an answer makes for a response."""
    given = answer.answer or {}
    ratings = given.get("ratings") if answer.ok else None
    return {
        "response_id": response["response_id"],
        "speech_id": response["speech_id"],
        "judge": desk.judge.id,
        "ratings": ratings,
        "score": desk.rubric.score(ratings) if ratings else None,
        "status": Status.OK if ratings else Status.INVALID,
        "error": answer.error,
        "raw_text": given.get("raw_text", ""),
        "attempts": answer.attempts,
    }


def check_share(judged: Sequence[Row], ceiling: float) -> None:
    """PsyrayError where too large a share of a judge's answers cannot be used; the answers stay in the ledger."""
    bad = [row for row in judged if row["status"] != Status.OK]
    if judged and len(bad) / len(judged) > ceiling:
        (error, _), *_ = Counter(row["error"] for row in bad).most_common(1)
        raise PsyrayError(
            f"the judge {bad[0]['judge']} gave no usable answer for {len(bad)} of {len(judged)} responses, more than "
            f"judge.max_invalid_share ({ceiling:.0%}); most often: {error[:300]}. The answers are in the ledger; "
            "change the judge, or raise the ceiling to leave those responses out, and run the same command again"
        )


def summary(judged: Sequence[Row], desk: Desk) -> dict[str, Any]:
    """Counts, shares and means over JUDGEMENTS rows."""
    good = [row for row in judged if row["status"] == Status.OK]
    return {
        "judge": desk.judge.id,
        "ok": len(good),
        "invalid_share": 1 - len(good) / len(judged) if judged else 0.0,
        "mean_score": sum(row["score"] for row in good) / len(good) if good else None,
        "principles": {k: sum(r["ratings"][k] for r in good) / len(good) for k in desk.rubric.keys} if good else {},
        **({"judges_agreement": judges_agreement(judged, desk.rubric)} if desk.members else {}),
    }
