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

SQLite serves one machine: its file has to be on a local disk, for its locks do not work over a network. Where
several machines write, give a PostgreSQL URL (`postgresql+psycopg://user:password@host/database`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from psyray.errors import PsyrayError

VERSION = 1  # of the tables below
CHUNK = 1000  # ids in one statement; databases bound the number of parameters
BUSY_S = 60  # how long a SQLite writer waits for its turn

ASKED, ANSWERED, FAILED = "asked", "answered", "failed"

T = TypeVar("T")

_TABLES = sa.MetaData()
# One row. Whoever reserves locks it, so that reservations follow one another on every database.
_LEDGER = sa.Table("ledger", _TABLES, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
_QUESTION = sa.Table(
    "question",
    _TABLES,
    sa.Column("question_id", sa.String(128), primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("oracle", sa.Text, nullable=False),
    sa.Column("rubric", sa.Text, nullable=False),
    sa.Column("payload", sa.Text, nullable=False),  # JSON
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("asks", sa.Integer, nullable=False),  # 1, and 1 more for each time a failure was rebought
    sa.Column("asked_at", sa.Float(53), nullable=False),  # Unix seconds
    sa.Column("answered_at", sa.Float(53)),
    sa.Column("answer", sa.Text),  # JSON
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),  # summed over asks, like latency and cost
    sa.Column("latency_s", sa.Float(53), nullable=False),
    sa.Column("cost", sa.Float(53), nullable=False),
    sa.Column("who", sa.Text, nullable=False),
)
_CHARGE = sa.Table(
    "charge",
    _TABLES,
    sa.Column("run_id", sa.String(1000), primary_key=True),  # may be a URI
    sa.Column("purpose", sa.String(128), primary_key=True),
    sa.Column("question_id", sa.ForeignKey(_QUESTION.c.question_id), primary_key=True),
    sa.Column("ask", sa.Integer, nullable=False),  # question.asks at the time: behind it, this ask has failed
    sa.Column("bought", sa.Boolean, nullable=False),  # False: an answer that was there already
    sa.Column("strategy", sa.String(128), nullable=False),
    sa.Column("scores", sa.Text, nullable=False),  # JSON
    sa.Column("at", sa.Float(53), nullable=False),  # Unix seconds
)


class LedgerError(PsyrayError):
    """The ledger cannot be opened, or was asked to do what it must not."""


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
        parsed = _parsed(url)
        self._secret = str(parsed.password or "")
        self._shown = parsed.set(query={}).render_as_string(hide_password=True)
        self._engine = _engine(parsed, self._shown)
        self._reader = self._engine.execution_options(psyray_reading=True)
        with self._transaction() as connection:
            if self._engine.dialect.name == "postgresql":  # two that create the tables at once would collide
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7073797261)"))
            _TABLES.create_all(connection)
            version = connection.scalar(sa.select(_LEDGER.c.version))
            if version is None:
                connection.execute(_LEDGER.insert(), {"version": VERSION})
            elif version != VERSION:
                raise LedgerError(f"the label ledger at {self._shown} has version {version}, not {VERSION}")

    def reserve(self, run_id: str, purpose: str, questions: Sequence[Question], budget: int | None) -> Reservation:
        """Charge the run for what it may ask, in the order given, in one transaction.

        `budget` bounds what is bought for run and purpose over all calls; None is no bound. An answer that is
        there is free. Raises LedgerError where an id is known with another kind, oracle or rubric.
        """
        unique = {q.question_id: q for q in reversed(questions)}  # the first of equal ids
        reservation, charges = Reservation([], {}, []), list[dict[str, Any]]()
        with self._transaction() as connection:
            connection.execute(sa.select(_LEDGER.c.version).with_for_update())
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
        given = sorted(answers, key=lambda a: a.question_id)  # one order of locks for all writers
        with self._transaction() as connection:
            for chunk in _chunks(given):
                known = _known(connection, [a.question_id for a in chunk])
                unknown = [a.question_id for a in chunk if a.question_id not in known]
                if unknown:
                    raise LedgerError(f"answer to a question that was never reserved: {unknown[0]}")
                connection.execute(_ANSWER, [_answer_values(a) for a in chunk])

    def answers(self, question_ids: Iterable[str]) -> dict[str, Answer]:
        """The answers and failures that are there, by question id; open and unknown questions are absent."""
        with self._transaction(reading=True) as connection:
            known = _known(connection, question_ids)
        return {question_id: _answer(row) for question_id, row in known.items() if row.status != ASKED}

    def spent(self, run_id: str) -> dict[str, int]:
        """Charges bought by the run, by purpose."""
        return {row["purpose"]: row["bought"] for row in self.summary(run_id)}

    def summary(self, run_id: str) -> list[dict[str, Any]]:
        """Per purpose: asked = bought + reused = answered + failed + open, and the cost of what was bought.

        The cost is in the oracle's unit. Where two runs bought one question, both show all that it has cost.
        """
        with self._transaction(reading=True) as connection:
            return [dict(row) for row in connection.execute(_SUMMARY, {"run": run_id}).mappings()]

    def close(self) -> None:
        """Let go of the connections; the next call opens new ones."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self, reading: bool = False) -> Iterator[sa.Connection]:
        """One transaction; what the database says becomes a LedgerError that holds no password and no row."""
        try:
            with (self._reader if reading else self._engine).begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            said = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
            said = said.replace(self._secret, "***") if self._secret else said
            raise LedgerError(f"the label ledger at {self._shown} failed: {said}") from None


_SETTLED = _QUESTION.c.status == ANSWERED
_LOST = ~_SETTLED & ((_QUESTION.c.status == FAILED) | (_CHARGE.c.ask < _QUESTION.c.asks))


def _count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.sum(sa.case((condition, 1), else_=0))


_SUMMARY = (
    sa.select(
        _CHARGE.c.purpose,
        sa.func.count().label("asked"),
        _count(_CHARGE.c.bought).label("bought"),
        _count(~_CHARGE.c.bought).label("reused"),
        _count(_SETTLED).label("answered"),
        _count(_LOST).label("failed"),
        _count(~_SETTLED & ~_LOST).label("open"),
        sa.func.sum(sa.case((_CHARGE.c.bought, _QUESTION.c.cost), else_=0.0)).label("cost"),
    )
    .join_from(_CHARGE, _QUESTION)
    .where(_CHARGE.c.run_id == sa.bindparam("run"))
    .group_by(_CHARGE.c.purpose)
    .order_by(_CHARGE.c.purpose)
)

_ANSWER = (
    _QUESTION.update()
    .where(_QUESTION.c.question_id == sa.bindparam("id"))
    .where((_QUESTION.c.status == ASKED) | (_QUESTION.c.status == sa.bindparam("beaten", type_=sa.String)))
    .values(
        status=sa.bindparam("new"),
        answered_at=sa.bindparam("now"),
        answer=sa.bindparam("what"),
        error=sa.bindparam("why"),
        attempts=_QUESTION.c.attempts + sa.bindparam("tries"),
        latency_s=_QUESTION.c.latency_s + sa.bindparam("took"),
        cost=_QUESTION.c.cost + sa.bindparam("price"),
        who=sa.bindparam("whom"),
    )
)

# Guarded by the status: an answer that arrives meanwhile stays.
_REBUY = (
    _QUESTION.update()
    .where(_QUESTION.c.question_id == sa.bindparam("id"), _QUESTION.c.status == FAILED)
    .values(status=ASKED, asks=_QUESTION.c.asks + 1)
)


def _parsed(url: str) -> sa.URL:
    try:
        return sa.make_url(url)
    except (ArgumentError, ValueError):  # their texts may hold the password
        raise LedgerError(
            "the label ledger's URL cannot be read; it is like sqlite:///runs/demo/ledger.db "
            "or postgresql+psycopg://user:password@host/database"
        ) from None


def _engine(url: sa.URL, shown: str) -> sa.Engine:
    """An engine that keeps rows out of error messages; on SQLite one writer at a time; others wait."""
    sqlite = url.get_backend_name() == "sqlite"
    try:
        if sqlite and url.database and url.database != ":memory:":
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, hide_parameters=True, pool_pre_ping=not sqlite)
    except (ArgumentError, ImportError, OSError) as error:  # no such database, no driver, no folder
        raise LedgerError(f"the label ledger at {shown} cannot be opened: {error}") from None
    if sqlite:
        sa.event.listen(engine, "connect", _set_up_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver would begin a transaction late, and not as a writer
    connection.execute(f"PRAGMA busy_timeout = {1000 * BUSY_S}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # what is paid for outlives a power cut
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(connection: sa.Connection) -> None:
    reading = connection.get_execution_options().get("psyray_reading")
    # A writer that starts as a reader cannot wait for its turn: SQLite answers "locked" at once.
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _chunks(things: Iterable[T]) -> Iterator[list[T]]:
    listed = list(things)
    return (listed[i : i + CHUNK] for i in range(0, len(listed), CHUNK))


def _known(connection: sa.Connection, question_ids: Iterable[str]) -> dict[str, sa.Row[Any]]:
    """The rows of the questions that are there, without their payload."""
    wanted = [c for c in _QUESTION.c if c.name != "payload"]
    found: dict[str, sa.Row[Any]] = {}
    for chunk in _chunks(question_ids):
        rows = connection.execute(sa.select(*wanted).where(_QUESTION.c.question_id.in_(chunk)))
        found.update({row.question_id: row for row in rows})
    return found


def _asks(connection: sa.Connection, run_id: str, question_ids: Iterable[str]) -> dict[str, dict[str, int]]:
    """What this run has charged already: question id -> purpose -> ask."""
    found: dict[str, dict[str, int]] = {}
    for chunk in _chunks(question_ids):
        mine = sa.and_(_CHARGE.c.run_id == run_id, _CHARGE.c.question_id.in_(chunk))
        for row in connection.execute(sa.select(_CHARGE).where(mine)):
            found.setdefault(row.question_id, {})[row.purpose] = row.ask
    return found


def _bought(connection: sa.Connection, run_id: str, purpose: str) -> int:
    mine = sa.and_(_CHARGE.c.run_id == run_id, _CHARGE.c.purpose == purpose, _CHARGE.c.bought)
    return connection.scalar(sa.select(sa.func.count()).select_from(_CHARGE).where(mine)) or 0


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
    for chunk in _chunks(_new_values(questions[q]) for q in bought if q not in known):
        connection.execute(_QUESTION.insert(), chunk)
    for again in _chunks({"id": q} for q in bought if q in known and known[q].status == FAILED):
        connection.execute(_REBUY, again)
    for some in _chunks(charges):
        connection.execute(_CHARGE.insert(), some)


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
