"""Oracles: who can say which of two responses is better. Each question is in the ledger before it is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from psyray.active.ledger import Answer, Question
from psyray.data.judge import TODO, Desk
from psyray.records import Row, Verdict, compare, content_id
from psyray.run import Folder
from psyray.stream import CALLS, stream

Label = tuple[Verdict, float, dict[str, Any]]  # verdict on (A, B), margin, what the oracle said


def comparison_question(desk: Desk, a: Row, b: Row, strategy: str, scores: dict[str, float]) -> tuple[Question, bool]:
    """The question `which of these two`, and whether it names them in the order (b, a).

    The two are put in the order of their texts' hashes, so that a pair is one question whichever way it came up.
    """
    flipped = content_id(a["text"]) > content_id(b["text"])
    first, second = (b, a) if flipped else (a, b)
    payload = {"messages": a["messages"], "a": first["text"], "b": second["text"]}
    key = content_id("comparison", desk.judge.id, desk.rubric.id, desk.section.tie_margin, payload)
    return Question(key, "comparison", desk.judge.id, desk.rubric.id, payload, strategy, scores), flipped


def label(
    folder: Folder, desk: Desk, asked: Sequence[tuple[Row, Row, float]], *, purpose: str, strategy: str, budget: int
) -> tuple[list[Label | None], dict[str, int]]:
    """Labels for pairs (a, b, acquisition value) in order, and counts; None where the budget did not reach."""
    questions = [comparison_question(desk, a, b, strategy, {"value": value}) for a, b, value in asked]
    reserved = desk.ledger.reserve(desk.run_id, purpose, [q for q, _ in questions], budget)
    put(folder, desk, reserved.to_ask, title=purpose)
    answers = desk.ledger.answers([q.question_id for q, _ in questions])
    labels = [read(answers.get(q.question_id), flipped) for q, flipped in questions]
    spent = next((row for row in desk.ledger.summary(desk.run_id) if row["purpose"] == purpose), {})
    counts = {key: int(spent.get(key, 0)) for key in ("asked", "bought", "reused", "answered")}
    return labels, counts | {"refused": len(reserved.refused)}


def read(answer: Answer | None, flipped: bool) -> Label | None:
    """An answer as a verdict on the pair as it came up."""
    if answer is None:
        return None
    if not answer.ok or answer.answer is None:
        return Verdict.INVALID, 0.0, {"error": answer.error}
    verdict, margin = Verdict(answer.answer["verdict"]), float(answer.answer["margin"])
    return (verdict.swap(), -margin, answer.answer) if flipped else (verdict, margin, answer.answer)


def put(folder: Folder, desk: Desk, questions: Sequence[Question], *, title: str) -> None:
    """Have the judge rate both sides of each comparison; the verdict is in the ledger as soon as both are there."""
    todo = [
        {"key": f"{q.question_id}/{side}", "messages": q.payload["messages"], "response": q.payload[side]}
        for q in questions
        for side in ("a", "b")
    ]
    halves: dict[str, dict[str, Row]] = {}

    def keep(results: list[Row]) -> None:
        complete = []
        for row in results:
            key, side = row["key"].split("/")
            halves.setdefault(key, {})[side] = row
            if len(halves[key]) == 2:
                complete.append(verdict(desk, key, **halves.pop(key)))
        desk.ledger.answer(complete)

    rate = partial(desk.judge.rate, folder=folder.path / CALLS)
    stream(folder, todo, rate, keep, title=title, schema=TODO, total=len(todo))


def verdict(desk: Desk, key: str, a: Row, b: Row) -> Answer:
    """The ledger's answer to a comparison from the ratings of its two sides."""
    ratings = [json.loads(side["ratings"]) if side["ratings"] else None for side in (a, b)]
    scores = [desk.rubric.score(r) if r else None for r in ratings]
    comparison = compare(key, ("a", scores[0]), ("b", scores[1]), desk.section.tie_margin)
    usable = comparison.verdict is not Verdict.INVALID
    answer = {"verdict": comparison.verdict, "margin": comparison.margin, "a": ratings[0], "b": ratings[1]}
    return Answer(
        key,
        ok=usable,
        answer=answer if usable else None,
        error="; ".join(filter(None, (a["error"], b["error"]))),
        attempts=a["attempts"] + b["attempts"],
        latency_s=a["latency_s"] + b["latency_s"],
        cost=a["cost"] + b["cost"],
        who=desk.judge.id,
    )
