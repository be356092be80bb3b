"""Which of two responses is better, as a question: how it is bought from the ledger, put to a judge, and read.

Each question is in the ledger before it is asked. psyray.active.oracle_kinds says who may be asked beside a judge.

Pointwise, the judge rates each of the two by itself. Pairwise, it sees them side by side, once in each order; where
the two verdicts differ it is a tie, and both stay in the answer as `orders`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from psyray.active.ledger import Answer, Question
from psyray.data.consensus import merge, verdicts_agreement, vote
from psyray.data.judge import Desk
from psyray.engines.judges import ASKED
from psyray.records import Row, Verdict, compare, content_id, speech_id
from psyray.rubric import UnusableAnswer, side_by_side
from psyray.run import Folder
from psyray.stream import stream

Why = Mapping[str, float]  # of a pair (a, b): its acquisition value, what was believed of a_ and b_
Pair = tuple[Row, Row, Why]  # two response rows and why they are asked about
Label = tuple[Verdict, float, dict[str, Any]]  # verdict on (A, B), margin, what the oracle said


def pair_question(
    oracle: str, rubric: str, rule: Any, pair: tuple[Row, Row], strategy: str, why: Why
) -> tuple[Question, bool]:
    """The question `which of these two`, and whether it names them in the order (b, a).

    The two are put in the order of their texts' hashes, so that a pair is one question whichever way it came up.
    `rule` is what else the answer depends on; `why` is kept beside the question and is no part of it.
    """
    a, b = pair
    flipped = content_id(a["text"]) > content_id(b["text"])
    first, second = (b, a) if flipped else (a, b)
    payload = {"messages": a["messages"], "a": first["text"], "b": second["text"]}
    key = content_id("comparison", oracle, rubric, rule, payload)
    scores = turned(why) if flipped else dict(why)
    return Question(key, "comparison", oracle, rubric, payload, strategy, scores), flipped


def turned(why: Why) -> dict[str, float]:
    """The same of the pair (b, a)."""
    side = {"a_": "b_", "b_": "a_"}
    return {side.get(key[:2], key[:2]) + key[2:]: value for key, value in why.items()}


def comparison_question(desk: Desk, a: Row, b: Row, strategy: str, why: Why) -> tuple[Question, bool]:
    """`pair_question` to a desk's judge."""
    pairwise = desk.section.form == "pairwise"
    rubric = desk.rubric.pairwise_id if pairwise else desk.rubric.id
    rule = None if pairwise else desk.section.tie_margin
    return pair_question(desk.judge.id, rubric, rule, (a, b), strategy, why)


def label(
    folder: Folder, desk: Desk, asked: Sequence[Pair], *, purpose: str, strategy: str, budget: int | None
) -> tuple[list[Label | None], dict[str, Any]]:
    """Labels for pairs (a, b, why) in order, and counts; None where the budget did not reach.

    A budget of None is no bound. Of a panel each judge is asked within the budget, the labels are what its rules make
    of the answers, the counts are summed over the judges, and `judges_agreement` stands beside them.
    """
    if desk.members:
        asking = partial(label, folder, asked=asked, strategy=strategy, budget=budget)
        each = [asking(desk=member, purpose=f"{purpose}/{member.judge.id}") for member in desk.members]
        given = list(zip(*(labels for labels, _ in each), strict=True))
        verdicts = [[one and one[0] for one in labels] for labels in given]
        agreed = verdicts_agreement(verdicts, [speech_id(a["messages"]) for a, _, _ in asked])
        counts = {key: sum(counts[key] for _, counts in each) for key in each[0][1]}
        return [panel_label(desk, labels) for labels in given], counts | {"judges_agreement": agreed}
    questions = [comparison_question(desk, a, b, strategy, why) for a, b, why in asked]
    return buy(desk, questions, partial(put, folder, desk, title=purpose), purpose=purpose, budget=budget)


def buy(
    desk: Desk,
    questions: Sequence[tuple[Question, bool]],
    ask: Callable[[Sequence[Question]], object],
    *,
    purpose: str,
    budget: int | None,
) -> tuple[list[Label | None], dict[str, Any]]:
    """Reserve the questions, have `ask` fill the ledger with answers to those that are due, and read them.

    Labels in order, None where the budget did not reach, and counts of these questions; `bought_before` are those that
    the run bought for this purpose beside them, which the budget has paid for as well.
    """
    reserved = desk.ledger.reserve(desk.run_id, purpose, [q for q, _ in questions], budget)
    ask(reserved.to_ask)
    answers = desk.ledger.answers([q.question_id for q, _ in questions])
    labels = [read(answers.get(q.question_id), flipped) for q, flipped in questions]
    counts = desk.ledger.counts(desk.run_id, purpose, [q.question_id for q, _ in questions])
    before = desk.ledger.spent(desk.run_id).get(purpose, 0) - counts["bought"]
    return labels, counts | {"refused": len(reserved.refused), "bought_before": before}


def read(answer: Answer | None, flipped: bool) -> Label | None:
    """An answer as a verdict on the pair as it came up."""
    return read_answer(answer, flipped) if answer else None


def read_answer(answer: Answer, flipped: bool) -> Label:
    """An answer that is there as a verdict on the pair as it came up."""
    if not answer.ok or answer.answer is None:
        return Verdict.INVALID, 0.0, {"error": answer.error}
    said = exchanged(answer.answer) if flipped else answer.answer
    return Verdict(said["verdict"]), float(said["margin"]), said


def exchanged(said: dict[str, Any]) -> dict[str, Any]:
    """What an oracle said, with A and B exchanged."""
    other = {{"a": "b", "b": "a"}.get(key, key): value for key, value in said.items()}
    other |= {"verdict": Verdict(said["verdict"]).swap(), "margin": -said["margin"]}
    if "orders" in said:
        first, second = (Verdict(shown).swap() for shown in said["orders"])
        other |= {"orders": [second, first], "raw_text": said["raw_text"][::-1]}
    if "judges" in said:
        other |= {"judges": [exchanged(one) if one and "verdict" in one else one for one in said["judges"]]}
    if "experts" in said:
        other |= {"experts": [_exchanged_vote(vote) for vote in said["experts"]]}
    return other


def _exchanged_vote(said: dict[str, Any]) -> dict[str, Any]:
    ratings = {{"a": "b", "b": "a"}[side]: values for side, values in said["ratings"].items()}
    vote = {"A": "B", "B": "A"}.get(said["vote"], said["vote"])
    return said | {"vote": vote, "ratings": ratings, "a_left": not said["a_left"]}


def panel_label(desk: Desk, given: Sequence[Label | None]) -> Label | None:
    """A panel's label from each judge's: from the ratings that its rule makes of theirs, or by vote.

    None where the budget reached fewer than must answer. Of a vote the margin is the mean of the judges' margins.
    """
    labels = [one for one in given if one is not None]
    if len(labels) < desk.panel.needed:
        return None
    verdicts = [one[0] if one else Verdict.INVALID for one in given]
    said = {"judges": [one and one[2] for one in given]}
    if desk.section.form == "pairwise":
        return vote(verdicts, desk.panel), fmean(margin for _, margin, _ in labels), said
    try:
        sides = {
            side: merge([one[2].get(side) if one else None for one in given], desk.rubric, desk.panel) for side in "ab"
        }
    except UnusableAnswer as error:
        return Verdict.INVALID, 0.0, said | {"error": str(error)}
    a, b = (desk.rubric.score(ratings) for ratings in sides.values())
    found = compare("", ("a", a), ("b", b), desk.section.tie_margin)
    return found.verdict, found.margin, said | sides


def put(folder: Folder, desk: Desk, questions: Sequence[Question], *, title: str) -> None:
    """Ask the two halves of each comparison; the verdict is in the ledger as soon as both are there."""
    if desk.section.form == "pairwise":
        split, halve, join = orders, desk.judge.compare, verdict_of_orders
    else:
        split, halve, join = sides, desk.judge.rate, verdict
    todo = [half for q in questions for half in split(q)]
    halves: dict[str, dict[str, Row]] = {}

    def keep(results: list[Row]) -> None:
        complete = []
        for row in results:
            key, half = row["key"].split("/")
            halves.setdefault(key, {})[half] = row
            if len(halves[key]) == 2:
                complete.append(join(desk, key, **halves.pop(key)))
        desk.ledger.answer(complete)

    pipeline = partial(halve, folder=desk.calls(folder))
    stream(folder, todo, pipeline, keep, title=title, schema=ASKED, total=len(todo))


def sides(asked: Question) -> list[Row]:
    """The rows that have A and B rated."""
    messages = asked.payload["messages"]
    return [
        {"key": f"{asked.question_id}/{side}", "messages": messages, "response": asked.payload[side]} for side in "ab"
    ]


def orders(asked: Question) -> list[Row]:
    """The rows that have the two compared, with A shown first and with B shown first."""
    messages, a, b = (asked.payload[key] for key in ("messages", "a", "b"))
    return [
        {"key": f"{asked.question_id}/{first}", "messages": messages, "response": shown}
        for first, shown in (("a", side_by_side(a, b)), ("b", side_by_side(b, a)))
    ]


def verdict(desk: Desk, key: str, a: Row, b: Row) -> Answer:
    """The ledger's answer to a comparison from the ratings of its two sides."""
    ratings = [json.loads(side["ratings"]) if side["ratings"] else None for side in (a, b)]
    scores = [desk.rubric.score(r) if r else None for r in ratings]
    comparison = compare(key, ("a", scores[0]), ("b", scores[1]), desk.section.tie_margin)
    usable = comparison.verdict is not Verdict.INVALID
    answer = {"verdict": comparison.verdict, "margin": comparison.margin, "a": ratings[0], "b": ratings[1]}
    return _answer(desk, key, a, b, usable, answer if usable else None)


def verdict_of_orders(desk: Desk, key: str, a: Row, b: Row) -> Answer:
    """The ledger's answer to a comparison from what was said with A shown first, and with B shown first.

    The margin is the mean preference for A: 1 or -1 where both orders agree.
    """
    raw = {"raw_text": [a["raw_text"], b["raw_text"]]}
    if not (a["ratings"] and b["ratings"]):
        return _answer(desk, key, a, b, False, raw)
    first, second = json.loads(a["ratings"])["preference"], -json.loads(b["ratings"])["preference"]  # for A
    shown = [compare(key, ("a", preference), ("b", 0.0), 0.0).verdict for preference in (first, second)]
    agreed = shown[0] if shown[0] is shown[1] else Verdict.TIE
    said = {"verdict": agreed, "margin": (first + second) / 2, "orders": shown}
    return _answer(desk, key, a, b, True, said | raw)


def _answer(desk: Desk, key: str, a: Row, b: Row, ok: bool, answer: dict[str, Any] | None) -> Answer:
    """An answer with what both halves cost."""
    return Answer(
        key,
        ok=ok,
        answer=answer,
        error="; ".join(filter(None, (a["error"], b["error"]))),
        attempts=a["attempts"] + b["attempts"],
        latency_s=a["latency_s"] + b["latency_s"],
        cost=a["cost"] + b["cost"],
        who=desk.judge.id,
    )
