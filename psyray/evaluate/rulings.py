"""What a judge or a reward model says of labelled comparisons.

Every question to a judge is in the label ledger before it is asked, so that an answer is bought once by all runs. To
see whether a judge repeats itself it is asked again: each time is a question of its own, with its own row and its
own charge, which no earlier answer can serve. A reward model is not asked but computed; nothing is charged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from psyray.active.ledger import Answer, Question
from psyray.active.oracles import Label, comparison_question, panel_label, put, read_answer
from psyray.config import Config
from psyray.data.judge import Desk, ask, question
from psyray.engines.judges import ASKED
from psyray.evaluate.agreement import Ruling
from psyray.evaluate.labelled import Labelled
from psyray.records import Row, Verdict, compare, content_id
from psyray.run import Folder
from psyray.stream import stream

PURPOSE = "agreement"


@dataclass(frozen=True)
class Again:
    """How often, and on how many comparisons (the first by id, so a random sample), the same is asked again."""

    times: int = 0
    comparisons: int = 100


class Form(Protocol):
    """How a desk comes to a label for a comparison: what it asks, of whom, and what the answers make."""

    def questions(self, item: Labelled) -> list[Question]: ...

    def put(self, folder: Folder, questions: Sequence[Question], title: str) -> None: ...

    def label(self, item: Labelled, answers: Sequence[Answer]) -> Label: ...


def form_of(desk: Desk) -> Form:
    """The desk's form."""
    if desk.members:
        return ByPanel(desk, tuple(form_of(member) for member in desk.members))
    return SideBySide(desk) if desk.section.form == "pairwise" else Pointwise(desk)


@dataclass(frozen=True)
class Pointwise:
    """Each response is rated by itself, once for all comparisons that it stands in."""

    desk: Desk

    def questions(self, item: Labelled) -> list[Question]:
        """The ratings of A and of B."""
        return [question(self.desk, {"messages": item.messages, "text": text}) for text in (item.a, item.b)]

    def put(self, folder: Folder, questions: Sequence[Question], title: str) -> None:
        """Have the judge rate; answers go to the ledger as they come."""
        ask(folder, self.desk, questions, len(questions), title=title)

    def label(self, item: Labelled, answers: Sequence[Answer]) -> Label:
        """What the two scores imply."""
        a, b = (answer.answer["ratings"] if answer.ok and answer.answer else None for answer in answers)
        scores = [self.desk.rubric.score(ratings) if ratings else None for ratings in (a, b)]
        found = compare(item.speech_id, ("a", scores[0]), ("b", scores[1]), self.desk.section.tie_margin)
        errors = "; ".join(dict.fromkeys(answer.error for answer in answers if answer.error))
        return found.verdict, found.margin, {"a": a, "b": b, "error": errors}


@dataclass(frozen=True)
class SideBySide:
    """The two responses are compared, in both orders."""

    desk: Desk

    def _question(self, item: Labelled) -> tuple[Question, bool]:
        a, b = ({"messages": item.messages, "text": text} for text in (item.a, item.b))
        return comparison_question(self.desk, a, b, PURPOSE, {})

    def questions(self, item: Labelled) -> list[Question]:
        """The one comparison, the same that a round's oracle would be asked."""
        return [self._question(item)[0]]

    def put(self, folder: Folder, questions: Sequence[Question], title: str) -> None:
        """Have the judge compare; answers go to the ledger as they come."""
        put(folder, self.desk, questions, title=title)

    def label(self, item: Labelled, answers: Sequence[Answer]) -> Label:
        """The verdict, and that of each order."""
        return read_answer(answers[0], self._question(item)[1])


@dataclass(frozen=True)
class ByPanel:
    """Each judge is asked in its form; the panel's rules make the label."""

    desk: Desk
    forms: tuple[Form, ...]

    def questions(self, item: Labelled) -> list[Question]:
        """Those of each judge in turn."""
        return [q for form in self.forms for q in form.questions(item)]

    def put(self, folder: Folder, questions: Sequence[Question], title: str) -> None:
        """Put to each judge what is for it."""
        for form, member in zip(self.forms, self.desk.members, strict=True):
            mine = [q for q in questions if q.oracle == member.judge.id]
            form.put(folder, mine, f"{title}, {member.judge.id}")

    def label(self, item: Labelled, answers: Sequence[Answer]) -> Label:
        """What the rules make of the judges' labels."""
        each = len(answers) // len(self.forms)
        shares = [answers[n * each : (n + 1) * each] for n in range(len(self.forms))]
        given = [form.label(item, mine) for form, mine in zip(self.forms, shares, strict=True)]
        return panel_label(self.desk, given) or (Verdict.INVALID, 0.0, {})


def judge_rulings(
    folder: Folder, desk: Desk, items: Sequence[Labelled], *, budget: int | None, again: Again
) -> list[Ruling]:
    """The judge's rulings in order; `budget` bounds the questions bought for this set and judge, repeats included."""
    form = form_of(desk)

    def buy(questions: list[Question], title: str) -> Mapping[str, Answer]:
        reserved = desk.ledger.reserve(desk.run_id, PURPOSE, questions, budget)
        form.put(folder, reserved.to_ask, title)
        return desk.ledger.answers(q.question_id for q in questions)

    asked = [form.questions(item) for item in items]
    answers = buy([q for questions in asked for q in questions], "agreement")
    rulings = [_read(form, item, questions, answers) for item, questions in zip(items, asked, strict=True)]
    for time in range(1, again.times + 1):
        repeated = [[_repeat(q, time) for q in questions] for questions in asked[: again.comparisons]]
        more = buy([q for questions in repeated for q in questions], f"asked again, {time} of {again.times}")
        for n, questions in enumerate(repeated):
            anew = _read(form, items[n], questions, more)
            same = all(_said(answers.get(q.question_id)) == _said(more.get(r.question_id))
                       for q, r in zip(asked[n], questions, strict=True))  # fmt: skip
            rulings[n] = with_repeat(rulings[n], anew, same)
    return rulings


def with_repeat(first: Ruling, anew: Ruling, same: bool) -> Ruling:
    """The ruling with one more repeat; unchanged where either was not asked."""
    if first.verdict is None or anew.verdict is None:
        return first
    return replace(first, again=(*first.again, anew.verdict), same_answers=same and first.same_answers is not False)


def _repeat(asked: Question, time: int) -> Question:
    return replace(asked, question_id=content_id(asked.question_id, "again", time))


def _read(form: Form, item: Labelled, questions: Sequence[Question], answers: Mapping[str, Answer]) -> Ruling:
    found = [answers[q.question_id] for q in questions if q.question_id in answers]
    if len(found) < len(questions):
        return Ruling(None)
    verdict, margin, said = form.label(item, found)
    orders = [Verdict(shown) for shown in said.get("orders", ())]
    return Ruling(verdict, margin, (orders[0], orders[1]) if orders else None, error=said.get("error", ""))


def _said(answer: Answer | None) -> object:
    return (answer.ok, answer.answer) if answer else None


def reward_rulings(
    folder: Folder, config: Config, items: Sequence[Labelled], *, model: Path, heads: Path | None, again: Again
) -> list[Ruling]:
    """A reward model's rulings in order: the higher score wins, equal ones tie, one that is no number is invalid."""
    first = _scores(folder, config, items, model, heads, "scores")
    rulings = [_by_score(item, first) for item in items]
    for time in range(1, again.times + 1):
        sample = items[: again.comparisons]
        # The other way round, so that the texts come in other batches than before.
        anew = _scores(folder, config, sample[::-1], model, heads, f"scored again, {time} of {again.times}")
        for n, item in enumerate(sample):
            same = all(first[key] == anew[key] for key in _keys(item))
            rulings[n] = with_repeat(rulings[n], _by_score(item, anew), same)
    return rulings


def _keys(item: Labelled) -> tuple[str, str]:
    return content_id(item.speech_id, item.a), content_id(item.speech_id, item.b)


def _by_score(item: Labelled, scores: Mapping[str, float]) -> Ruling:
    a, b = (scores[key] if math.isfinite(scores[key]) else None for key in _keys(item))
    found = compare(item.speech_id, ("a", a), ("b", b), 0.0)
    return Ruling(found.verdict, found.margin)


def _scores(
    folder: Folder, config: Config, items: Sequence[Labelled], model: Path, heads: Path | None, title: str
) -> dict[str, float]:
    from psyray.reward.score import ScoreActor, on_actors

    todo: dict[str, Row] = {}
    for item in items:
        for key, text in zip(_keys(item), (item.a, item.b), strict=True):
            todo.setdefault(key, {"key": key, "messages": item.messages, "response": text})
    scores: dict[str, float] = {}

    def keep(results: list[Row]) -> None:
        scores.update({row["key"]: row["score"] for row in results})

    pipeline = partial(on_actors, ScoreActor, config=config, model=model, read=heads)
    stream(folder, todo.values(), pipeline, keep, title=title, schema=ASKED, total=len(todo))
    return scores
