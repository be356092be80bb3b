"""The label ledger: what was asked of an oracle, for which run, at what price, and what came back.

    ledger = Ledger("sqlite:///runs/demo/ledger.db")
    reservation = ledger.reserve("demo", "round-1", questions, budget=200)  # a row each, before it is asked
    ledger.answer(ask(reservation.to_ask))  # as they come; the first answer wins
    labels = ledger.answers(q.question_id for q in questions)

The promises:
- A question is a row before it is asked, and the budget of (run, purpose) is checked in the same transaction.
- A restart that reserves the same questions again gets the open ones back without a second charge.
- An answer is final and free to every later run that puts the same question to the same oracle and rubric.
- A failure is an answer to the run that bought it; a later run may buy the question again.
- A question that another run has asked and that is still open is charged to this run as well and asked again:
  that run may be dead. The first answer wins, and serves both.

Within a run, one process at a time reserves for a purpose and hands `to_ask` to its workers: nothing tells a
second process that reserves the same open questions from a restart. The budget holds either way.

psyray.active.database says which databases serve; psyray.active.queue is the part of it that people answer from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from psyray.active.database import CHARGE, QUESTION, Database, LedgerError, chunks, one_at_a_time, parsed
from psyray.errors import PsyrayError

ASKED, ANSWERED, FAILED = "asked", "answered", "failed"


@dataclass(frozen=True)
class Question:
    """What an oracle is asked; `question_id` covers kind, oracle, rubric and the texts."""

    question_id: str
    kind: str  # "rating" | "comparison"
    oracle: str
    rubric: str
    payload: dict[str, Any]
    strategy: str = ""  # why it is asked: the acquisition function and its values
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came back; a failure has an `error`, and in `answer` what was said all the same."""

    question_id: str
    ok: bool
    answer: dict[str, Any] | None
    error: str = ""
    attempts: int = 1
    latency_s: float = 0.0
    cost: float = 0.0
    who: str = ""

    def __post_init__(self) -> None:
        if self.ok and self.answer is None:
            raise ValueError(f"question {self.question_id}: ok without an answer")


@dataclass(frozen=True)
class Reservation:
    """What to do with each question, in the order given."""

    to_ask: list[Question]
    answered: dict[str, Answer]  # failures too
    refused: list[Question]  # the budget did not reach


class Ledger:
    """The label ledger at a database URL; it makes its tables where they are not there yet."""

    def __init__(self, url: str):
        self.database = Database(url)

    def reserve(self, run_id: str, purpose: str, questions: Sequence[Question], budget: int | None) -> Reservation:
        """Charge the run for what it may ask, in the order given, in one transaction.

        `budget` bounds what is bought for run and purpose over all calls; None is no bound. An answer that is
        there is free. Raises LedgerError where an id is known with another kind, oracle or rubric.
        """
        unique = {q.question_id: q for q in reversed(questions)}  # the first of equal ids
        reservation, charges = Reservation([], {}, []), list[dict[str, Any]]()
        with self.database.transaction() as connection:
            one_at_a_time(connection)
            known, asks = _known(connection, unique), _asks(connection, run_id, unique)
            left = float("inf") if budget is None else budget - _bought(connection, run_id, purpose)
            for question_id in dict.fromkeys(q.question_id for q in questions):
                question, row, mine = unique[question_id], known.get(question_id), asks.get(question_id, {})
                state = _state(question, row, mine)
                if state == "buy" and left < 1:
                    reservation.refused.append(question)
                    continue
                if row is not None and state == "done":
                    reservation.answered[question_id] = _answer(row)
                else:
                    reservation.to_ask.append(question)
                left -= state == "buy"
                if purpose not in mine:
                    charges.append(_charge(run_id, purpose, question, row, mine, bought=state == "buy"))
            _charge_all(connection, charges, unique, known)
        return reservation

    def answer(self, answers: Iterable[Answer]) -> None:
        """Write answers down: the first to a question wins, except that an answer replaces a failure.

        All or none; raises LedgerError for a question that was never reserved.
        """
        with self.database.transaction() as connection:
            write_answers(connection, answers)

    def answers(self, question_ids: Iterable[str]) -> dict[str, Answer]:
        """The answers and failures that are there, by question id; open and unknown questions are absent."""
        with self.database.transaction(reading=True) as connection:
            known = _known(connection, question_ids)
        return {question_id: _answer(row) for question_id, row in known.items() if row.status != ASKED}

    def spent(self, run_id: str) -> dict[str, int]:
        """Charges bought by the run, by purpose."""
        return {row["purpose"]: row["bought"] for row in self.summary(run_id)}

    def summary(self, run_id: str) -> list[dict[str, Any]]:
        """Per purpose: asked = bought + reused = answered + failed + open, and the cost of what was bought.

        The cost is in the oracle's unit. Where two runs bought one question, both show all that it has cost.
        """
        with self.database.transaction(reading=True) as connection:
            return [dict(row) for row in connection.execute(_SUMMARY, {"run": run_id}).mappings()]

    def counts(self, run_id: str, purpose: str, question_ids: Iterable[str]) -> dict[str, int]:
        """Of some questions that the run asked for a purpose: asked = bought + reused, and how many are answered."""
        found = dict.fromkeys(("asked", "bought", "reused", "answered"), 0)
        with self.database.transaction(reading=True) as connection:
            for chunk in chunks(set(question_ids)):
                charges = sa.select(CHARGE.c.run_id, CHARGE.c.purpose, CHARGE.c.bought, QUESTION.c.status)
                rows = connection.execute(charges.join_from(CHARGE, QUESTION).where(CHARGE.c.question_id.in_(chunk)))
                for row in rows:  # the run is told apart here, as in `_asks`
                    if (row.run_id, row.purpose) == (run_id, purpose):
                        found["asked"] += 1
                        found["bought" if row.bought else "reused"] += 1
                        found["answered"] += row.status == ANSWERED
        return found

    def close(self) -> None:
        """Let go of the connections; the next call opens new ones."""
        self.database.close()


def ledger_url(url: str | None, run: Path) -> str:
    """The configured database, else SQLite beside the run folders.

    PsyrayError where the URL holds a password: a run folder and its manifests keep the settings.
    """
    if url and (parsed(url).password or "password" in parsed(url).query):
        raise PsyrayError(
            "ledger.url holds a password, which the run folder would keep: leave it out of the URL and set PGPASSWORD, "
            "or write it into ~/.pgpass"
        )
    return url or f"sqlite:///{ledger_file(run)}"


def ledger_file(run: Path) -> Path:
    """The SQLite file beside the run folders, for a run that configures no database."""
    return run.parent / "labels.db"


def write_answers(connection: sa.Connection, answers: Iterable[Answer]) -> None:
    """Write answers down in an open transaction, as `Ledger.answer` does."""
    given = sorted(answers, key=lambda a: a.question_id)  # one order of locks for all writers
    for chunk in chunks(given):
        known = _known(connection, [a.question_id for a in chunk])
        unknown = [a.question_id for a in chunk if a.question_id not in known]
        if unknown:
            raise LedgerError(f"answer to a question that was never reserved: {unknown[0]}")
        connection.execute(_ANSWER, [_answer_values(a) for a in chunk])


_SETTLED = QUESTION.c.status == ANSWERED
_LOST = ~_SETTLED & ((QUESTION.c.status == FAILED) | (CHARGE.c.ask < QUESTION.c.asks))


def _count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.sum(sa.case((condition, 1), else_=0))


_SUMMARY = (
    sa.select(
        CHARGE.c.purpose,
        sa.func.count().label("asked"),
        _count(CHARGE.c.bought).label("bought"),
        _count(~CHARGE.c.bought).label("reused"),
        _count(_SETTLED).label("answered"),
        _count(_LOST).label("failed"),
        _count(~_SETTLED & ~_LOST).label("open"),
        sa.func.sum(sa.case((CHARGE.c.bought, QUESTION.c.cost), else_=0.0)).label("cost"),
    )
    .join_from(CHARGE, QUESTION)
    .where(CHARGE.c.run_id == sa.bindparam("run"))
    .group_by(CHARGE.c.purpose)
    .order_by(CHARGE.c.purpose)
)

_ANSWER = (
    QUESTION.update()
    .where(QUESTION.c.question_id == sa.bindparam("id"))
    .where((QUESTION.c.status == ASKED) | (QUESTION.c.status == sa.bindparam("beaten", type_=sa.String)))
    .values(
        status=sa.bindparam("new"),
        answered_at=sa.bindparam("now"),
        answer=sa.bindparam("what"),
        error=sa.bindparam("why"),
        attempts=QUESTION.c.attempts + sa.bindparam("tries"),
        latency_s=QUESTION.c.latency_s + sa.bindparam("took"),
        cost=QUESTION.c.cost + sa.bindparam("price"),
        who=sa.bindparam("whom"),
    )
)

# Guarded by the status: an answer that arrives meanwhile stays.
_REBUY = (
    QUESTION.update()
    .where(QUESTION.c.question_id == sa.bindparam("id"), QUESTION.c.status == FAILED)
    .values(status=ASKED, asks=QUESTION.c.asks + 1)
)


def _known(connection: sa.Connection, question_ids: Iterable[str]) -> dict[str, sa.Row[Any]]:
    """The rows of the questions that are there, without their payload."""
    wanted = [c for c in QUESTION.c if c.name != "payload"]
    found: dict[str, sa.Row[Any]] = {}
    for chunk in chunks(question_ids):
        rows = connection.execute(sa.select(*wanted).where(QUESTION.c.question_id.in_(chunk)))
        found.update({row.question_id: row for row in rows})
    return found


def _asks(connection: sa.Connection, run_id: str, question_ids: Iterable[str]) -> dict[str, dict[str, int]]:
    """What this run has charged already: question id -> purpose -> ask."""
    found: dict[str, dict[str, int]] = {}
    for chunk in chunks(question_ids):
        # The run is told apart here: asked for in the query, SQLite would go through all charges of the run each time.
        for row in connection.execute(sa.select(CHARGE).where(CHARGE.c.question_id.in_(chunk))):
            if row.run_id == run_id:
                found.setdefault(row.question_id, {})[row.purpose] = row.ask
    return found


def _bought(connection: sa.Connection, run_id: str, purpose: str) -> int:
    mine = sa.and_(CHARGE.c.run_id == run_id, CHARGE.c.purpose == purpose, CHARGE.c.bought)
    return connection.scalar(sa.select(sa.func.count()).select_from(CHARGE).where(mine)) or 0


def _state(question: Question, row: sa.Row[Any] | None, mine: Mapping[str, int]) -> str:
    """One of "buy": a charge is due; "open": this run has paid and waits; "done": answered or failed."""
    if row is None:
        return "buy"
    if (row.kind, row.oracle, row.rubric) != (question.kind, question.oracle, question.rubric):
        raise LedgerError(
            f"question {question.question_id} is in the ledger as {row.kind} by {row.oracle} on {row.rubric}"
            f", not as {question.kind} by {question.oracle} on {question.rubric}"
        )
    if row.status == ANSWERED:
        return "done"
    if not mine:
        return "buy"
    return "done" if row.status == FAILED or max(mine.values()) < row.asks else "open"


def _charge(
    run_id: str,
    purpose: str,
    question: Question,
    row: sa.Row[Any] | None,
    mine: Mapping[str, int],
    *,
    bought: bool,
) -> dict[str, Any]:
    asks = 1 if row is None else row.asks + (bought and row.status == FAILED)
    return {
        "run_id": run_id,
        "purpose": purpose,
        "question_id": question.question_id,
        "ask": max(mine.values(), default=asks),
        "bought": bought,
        "strategy": question.strategy,
        "scores": json.dumps(question.scores),
        "at": time.time(),
    }


def _charge_all(
    connection: sa.Connection,
    charges: Sequence[Mapping[str, Any]],
    questions: Mapping[str, Question],
    known: Mapping[str, sa.Row[Any]],
) -> None:
    """Write the charges, the questions that are new, and the failed ones that are bought again."""
    bought = sorted(c["question_id"] for c in charges if c["bought"])
    for chunk in chunks(_new_values(questions[q]) for q in bought if q not in known):
        connection.execute(QUESTION.insert(), chunk)
    for again in chunks({"id": q} for q in bought if q in known and known[q].status == FAILED):
        connection.execute(_REBUY, again)
    for some in chunks(charges):
        connection.execute(CHARGE.insert(), some)


def _new_values(question: Question) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        "kind": question.kind,
        "oracle": question.oracle,
        "rubric": question.rubric,
        "payload": json.dumps(question.payload),
        "status": ASKED,
        "asks": 1,
        "asked_at": time.time(),
        "error": "",
        "attempts": 0,
        "latency_s": 0.0,
        "cost": 0.0,
        "who": "",
    }


def _answer_values(answer: Answer) -> dict[str, Any]:
    return {
        "id": answer.question_id,
        "new": ANSWERED if answer.ok else FAILED,
        "beaten": FAILED if answer.ok else ASKED,  # an answer replaces a failure as well
        "now": time.time(),
        "what": None if answer.answer is None else json.dumps(answer.answer),
        # What an oracle says may hold what a database cannot store as text.
        "why": answer.error.encode("utf-8", "replace").decode().replace("\0", "?"),
        "tries": answer.attempts,
        "took": answer.latency_s,
        "price": answer.cost,
        "whom": answer.who,
    }


def _answer(row: sa.Row[Any]) -> Answer:
    """The answer in a row; a row that is not answered is a failure, be it that another run asks it again."""
    return Answer(
        question_id=row.question_id,
        ok=row.status == ANSWERED,
        answer=json.loads(row.answer) if row.answer else None,
        error=row.error,
        attempts=row.attempts,
        latency_s=row.latency_s,
        cost=row.cost,
        who=row.who,
    )
