"""Judgements: each response rated once, every question in the label ledger before it is asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from psyray.active.ledger import Answer, Ledger, Question
from psyray.ceiling import Ceiling, check_ceiling
from psyray.data.consensus import judges_agreement, panel_rows
from psyray.engines import journal
from psyray.engines.judges import ASKED, Judge, error_class
from psyray.errors import PsyrayError
from psyray.files import ROWS_IN_MEMORY
from psyray.records import JUDGEMENTS, Row, Status, content_id
from psyray.rubric import Rubric
from psyray.run import Artifact, Folder, Parts, Run
from psyray.sections.data import JudgeSection, PanelSection
from psyray.stream import CALLS, stream

CHANGE_THE_JUDGE = (
    "The answers are in the ledger; change the judge, or raise the ceiling to leave those out, and run the same "
    "command again (a run with another run.path asks anew where there is no usable answer, and buys no other twice)"
)


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
    setting: str = "judge"  # the section's name

    @property
    def ceiling(self) -> Ceiling:
        """How many of its answers may be unusable."""
        return Ceiling(self.section.max_invalid_share, f"{self.setting}.max_invalid_share")

    @property
    def identity(self) -> dict[str, str]:
        """What stands for the desk in a fingerprint."""
        return {"judge": self.judge.id, "rubric": self.rubric.id}

    @property
    def labels_identity(self) -> dict[str, Any]:
        """What stands for it where it compares."""
        pairwise = {"pairwise": self.rubric.pairwise_id} if self.section.form == "pairwise" else {}
        return self.identity | {"tie_margin": self.section.tie_margin} | pairwise

    def calls(self, folder: Folder) -> Path:
        """Where the judge keeps the journal of its calls in a stage's folder."""
        return folder.path / CALLS / self.judge.id


Responses = Callable[[], Iterable[Row]]  # gives the same rows each time


def judgements_stage(run: Run, desk: Desk, responses: Artifact) -> Artifact:
    """The stage `judgements`: every usable response rated by the rubric."""

    def make(folder: Folder) -> Mapping[str, Any]:
        count = responses.manifest["rows"]
        parts = judge(folder, desk, responses.each, count, purpose="judgements", bounded=True)
        usable = sum(row["status"] == Status.OK for row in responses.each(["status"]))
        if usable and not len(parts.ids):
            refuse_spent(desk, usable)
        parts.finish()
        counts = {"unjudged": usable - len(parts.ids)}
        return summary(parts.each, desk) | counts | journal.stats(folder.path / CALLS)

    settings: dict[str, Any] = desk.identity | {"budget": desk.section.budget}
    budgets = {member.judge.id: member.section.budget for member in desk.members}
    settings |= {"budgets": budgets} if set(budgets.values()) - {desk.section.budget} else {}
    return run.stage("judgements", settings, [responses], make)


def refuse_spent(desk: Desk, usable: int) -> None:
    """PsyrayError where an earlier version of the run has spent the budget, so that no response was judged."""
    spent = desk.ledger.spent(desk.run_id)
    if bought := sum(count for purpose, count in spent.items() if purpose.partition("/")[0] == "judgements"):
        raise PsyrayError(
            f"judge.budget {desk.section.budget} left none of {usable} responses judged: the run bought {bought} "
            "judgements before, with other settings. Give the changed run a run.path of its own, with a budget of its "
            "own (answers that the ledger knows are free there); or raise judge.budget"
        )


def judge(folder: Folder, desk: Desk, responses: Responses, count: int, *, purpose: str, bounded: bool) -> Parts:
    """JUDGEMENTS rows of the usable responses; answers known to the ledger are free.

    Where it is `bounded`, as many as the judge's budget buys, each judge's of a panel.
    PsyrayError where more than `judge.max_invalid_share` of the answers cannot be used.
    """
    parts = folder.parts(JUDGEMENTS, "response_id")

    def still_open() -> Iterator[Row]:
        return (row for row in responses() if row["response_id"] not in parts.ids)

    if desk.members:
        for member in desk.members:
            budget = member.section.budget if bounded else None
            buy(folder, member, still_open, count, f"{purpose}/{member.judge.id}", budget)
            check_share(judged(member, responses), member, purpose)
    else:
        buy(folder, desk, still_open, count, purpose, desk.section.budget if bounded else None)
    for rows in settled(desk, still_open):
        parts.append(rows)
    check_share(parts.each(["status", "error"]), desk, purpose)
    return parts


def buy(folder: Folder, desk: Desk, responses: Responses, count: int, purpose: str, budget: int | None) -> None:
    """Have the ledger hold an answer for every usable response, as far as the budget reaches."""
    ask(folder, desk, open_questions(desk, responses, purpose, budget), count, title=purpose)


def open_questions(desk: Desk, responses: Responses, purpose: str, budget: int | None) -> Iterator[Question]:
    """What the judge still has to be asked: reserved in the ledger, each question once however many have its text."""
    seen = set[str]()
    for chunk in chunks(responses):
        fresh = {q.question_id: q for q in (question(desk, row) for row in chunk) if q.question_id not in seen}
        seen.update(fresh)
        yield from desk.ledger.reserve(desk.run_id, purpose, list(fresh.values()), budget).to_ask


def ask(folder: Folder, desk: Desk, questions: Iterable[Question], count: int, *, title: str) -> None:
    """Put the questions, `count` or fewer, to the judge; answers are in the ledger as they come."""

    def keep(results: list[Row]) -> None:
        desk.ledger.answer(_answer(result, desk.judge.id) for result in results)

    todo = ({"key": q.question_id, **q.payload} for q in questions)
    rate = partial(desk.judge.rate, folder=desk.calls(folder))
    stream(folder, todo, rate, keep, title=title, schema=ASKED, total=count)


def chunks(responses: Responses) -> Iterator[list[Row]]:
    """The usable responses, some thousands at a time."""
    usable = (row for row in responses() if row["status"] == Status.OK)
    while chunk := list(islice(usable, ROWS_IN_MEMORY)):
        yield chunk


def settled(desk: Desk, responses: Responses) -> Iterator[list[Row]]:
    """JUDGEMENTS rows of the responses whose question is answered; a panel's by its rule."""
    for chunk in chunks(responses):
        if desk.members:
            each = [answered(member, chunk) for member in desk.members]
            yield panel_rows(each, desk.judge.id, desk.rubric, desk.panel)
        else:
            yield answered(desk, chunk)


def answered(desk: Desk, chunk: Sequence[Row]) -> list[Row]:
    """One judge's JUDGEMENTS rows, by the ledger."""
    asked = [(row, question(desk, row).question_id) for row in chunk]
    answers = desk.ledger.answers(key for _, key in asked)
    return [judgement(desk, row, answers[key]) for row, key in asked if key in answers]


def judged(desk: Desk, responses: Responses) -> Iterator[Row]:
    """One judge's JUDGEMENTS rows, one after another."""
    return (row for rows in settled(desk, responses) for row in rows)


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


def check_share(judged: Iterable[Row], desk: Desk, purpose: str) -> None:
    """PsyrayError where too large a share of a judge's answers cannot be used; the answers stay in the ledger."""
    count, bad = 0, Counter[str]()
    for row in judged:
        count += 1
        if row["status"] != Status.OK:
            bad[row["error"]] += 1
    what = f"responses have no usable answer by the judge {desk.judge.id}"
    check_ceiling(purpose, what, bad, count, desk.ceiling, lambda: CHANGE_THE_JUDGE)


def summary(judged: Responses, desk: Desk) -> dict[str, Any]:
    """Counts, shares and means over JUDGEMENTS rows, and for a panel how far its judges agree."""
    count, good, total, errors = 0, 0, Counter[str](), Counter[str]()
    for row in judged():
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
        **({"judges_agreement": judges_agreement(judged(), desk.rubric)} if desk.members else {}),
    }
