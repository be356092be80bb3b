"""Judgements: each response rated once, every question in the label ledger before it is asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa

from psyray.active.ledger import Answer, Ledger, Question
from psyray.config import JudgeSection
from psyray.engines import journal
from psyray.engines.judges import Judge, error_class
from psyray.errors import PsyrayError
from psyray.records import JUDGEMENTS, MESSAGES, Row, Status, content_id
from psyray.rubric import Rubric
from psyray.run import ROWS_IN_MEMORY, Artifact, Folder, Parts, Run
from psyray.stream import CALLS, stream


@dataclass(frozen=True)
class Desk:
    """Where ratings are bought: a judge, its rubric, the ledger, and the run that pays."""

    judge: Judge
    rubric: Rubric
    ledger: Ledger
    run_id: str
    section: JudgeSection

    @property
    def identity(self) -> dict[str, str]:
        """What stands for the desk in a fingerprint."""
        return {"judge": self.judge.id, "rubric": self.rubric.id}


TODO = pa.schema([("key", pa.string()), ("messages", MESSAGES), ("response", pa.string())])
Responses = Callable[[], Iterable[Row]]  # gives the same response rows each time


def judgements_stage(run: Run, desk: Desk, responses: Artifact) -> Artifact:
    """The stage `judgements`: every usable response rated by the rubric."""

    def make(folder: Folder) -> Mapping[str, Any]:
        count = responses.manifest["rows"]
        parts = judge(folder, desk, responses.each, count, purpose="judgements", budget=desk.section.budget)
        parts.finish()
        usable = sum(row["status"] == Status.OK for row in responses.each(["status"]))
        calls = journal.stats(folder.path / CALLS)
        stats = summary(parts.each(), desk) | {"unjudged": usable - len(parts.ids)}
        return stats | ({"calls": calls} if calls else {})

    return run.stage("judgements", desk.identity | {"budget": desk.section.budget}, [responses], make)


def judge(folder: Folder, desk: Desk, responses: Responses, count: int, *, purpose: str, budget: int | None) -> Parts:
    """JUDGEMENTS rows of the usable responses, as many as the budget buys; answers known to the ledger are free.

    PsyrayError where more than `judge.max_invalid_share` of the answers cannot be used.
    """
    parts = folder.parts(JUDGEMENTS, "response_id")
    todo = open_questions(desk, responses, parts, purpose, budget)
    rate = partial(desk.judge.rate, folder=folder.path / CALLS)
    stream(folder, todo, rate, partial(keep, desk), title=purpose, schema=TODO, total=count)
    settle(desk, responses, parts)
    check_share(parts.each(["status", "error"]), desk)
    return parts


def chunks(desk: Desk, responses: Responses, parts: Parts) -> Iterator[list[tuple[Row, Question]]]:
    """The usable responses that have no row yet, each with its question, some thousands at a time."""
    open_rows = (row for row in responses() if row["status"] == Status.OK and row["response_id"] not in parts.ids)
    while chunk := [(row, question(desk, row)) for row in islice(open_rows, ROWS_IN_MEMORY)]:
        yield chunk


def open_questions(desk: Desk, responses: Responses, parts: Parts, purpose: str, budget: int | None) -> Iterator[Row]:
    """What the judge still has to be asked: reserved in the ledger, each question once however many have its text."""
    seen = set[str]()
    for chunk in chunks(desk, responses, parts):
        fresh = {q.question_id: q for _, q in chunk if q.question_id not in seen}
        seen.update(fresh)
        for asked in desk.ledger.reserve(desk.run_id, purpose, list(fresh.values()), budget).to_ask:
            yield {"key": asked.question_id, **asked.payload}


def keep(desk: Desk, results: list[Row]) -> None:
    """Put the judge's answers into the ledger."""
    desk.ledger.answer(_answer(result, desk.judge.id) for result in results)


def settle(desk: Desk, responses: Responses, parts: Parts) -> None:
    """A row for each response whose question is answered."""
    for chunk in chunks(desk, responses, parts):
        answers = desk.ledger.answers(q.question_id for _, q in chunk)
        parts.append(judgement(desk, row, answers[q.question_id]) for row, q in chunk if q.question_id in answers)


def question(desk: Desk, response: Row) -> Question:
    """The question `rate this response`; equal text under an equal conversation is an equal question."""
    payload = {"messages": response["messages"], "response": response["text"]}
    key = content_id("rating", desk.judge.id, desk.rubric.id, payload)
    return Question(key, "rating", desk.judge.id, desk.rubric.id, payload)


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
        "crisis": response.get("crisis"),
        "judge": desk.judge.id,
        "ratings": ratings,
        "score": desk.rubric.score(ratings) if ratings else None,
        "status": Status.OK if ratings else Status.INVALID,
        "error": answer.error,
        "raw_text": given.get("raw_text", ""),
        "attempts": answer.attempts,
    }


def check_share(judged: Iterable[Row], desk: Desk) -> None:
    """PsyrayError where too large a share of a judge's answers cannot be used; the answers stay in the ledger."""
    ceiling, count, bad = desk.section.max_invalid_share, 0, Counter[str]()
    for row in judged:
        count += 1
        if row["status"] != Status.OK:
            bad[row["error"]] += 1
    if bad.total() > ceiling * count:
        (error, _), *_ = bad.most_common(1)
        raise PsyrayError(
            f"the judge {desk.judge.id} gave no usable answer for {bad.total()} of {count} responses, more than "
            f"judge.max_invalid_share ({ceiling:.0%}); most often: {error[:300]}. The answers are in the ledger; "
            "change the judge, or raise the ceiling to leave those responses out, and run the same command again"
        )


def summary(judged: Iterable[Row], desk: Desk) -> dict[str, Any]:
    """Counts, shares and means over JUDGEMENTS rows."""
    count, good, total, errors = 0, 0, Counter[str](), Counter[str]()
    for row in judged:
        count += 1
        if row["status"] == Status.OK:
            good += 1
            total.update({"score": row["score"], **{f"/{key}": value for key, value in row["ratings"].items()}})
        else:
            errors[error_class(row["error"])] += 1
    return {
        "judge": desk.judge.id,
        "ok": good,
        "invalid_share": 1 - good / count if count else 0.0,
        "errors": dict(errors.most_common()),
        "mean_score": total["score"] / good if good else None,
        "principles": {key: total[f"/{key}"] / good for key in desk.rubric.keys} if good else {},
    }
