"""The expert queue: questions of the label ledger that people answer, several at a time and each at most once.

    queue = ExpertQueue(ledger.database)
    queue.open(reservation.to_ask, overlap=2)  # two experts each
    lease = queue.lease("anna", 600)  # the conversation and the two responses, blind, in anna's own order
    queue.answer("anna", lease.question_id, Choice.LEFT, note="takes up the loss")
    queue.settle([q.question_id for q in reservation.to_ask], undo_s=30)  # what is complete, into the ledger

The promises:
- A question is shown to no more experts at once than still have to answer it. A lease that has run out is free for
  others; who held it may still answer as long as nobody took the place.
- One expert has one ticket for a question, so there is at most one answer of theirs; sent twice it counts once.
- An answer can be taken back until its question is settled: then it is in the ledger and final. A skip can while
  nobody else has taken the place that it left.
- Every call is one transaction that locks one question, so that several processes and machines may call at once and a
  `kill -9` leaves either all of a call or nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from psyray.active.database import CHARGE, ITEM, QUESTION, TICKET, Database, chunks, one_at_a_time
from psyray.active.ledger import Answer, Question, write_answers
from psyray.active.votes import Choice, Vote, agreement, consensus, decided
from psyray.errors import PsyrayError
from psyray.records import Message, content_id

LEASE_S = 900.0
Ratings = Mapping[str, Mapping[str, float]]  # by "left" and "right", then by principle

_OTHER = TICKET.alias("other")
_MINE = TICKET.alias("mine")


class QueueError(PsyrayError):
    """What an expert asked of the queue cannot be done."""


class NoTicket(QueueError):
    """The question was never given to this expert, or there is nothing to take back."""


class Answered(QueueError):
    """The expert has answered the question already, and otherwise."""


class Gone(QueueError):
    """Too late: the question is settled, or others took the place after the lease had run out."""


@dataclass(frozen=True)
class Said:
    """An expert's answer, by the sides that they saw."""

    choice: Choice
    ratings: Ratings
    note: str


@dataclass(frozen=True)
class Lease:
    """One question as one expert sees it."""

    question_id: str
    messages: list[Message]
    left: str
    right: str
    until: float  # Unix seconds
    said: Said | None = None  # what the expert had answered and took back just now


@dataclass(frozen=True)
class Waiting:
    """An open question that lacks answers, and what those who have come did with it."""

    question_id: str
    lacking: int
    answered: tuple[str, ...]
    skipped: tuple[str, ...]
    may: tuple[str, ...]  # who has come and has neither answered nor skipped it


class ExpertQueue:
    """The questions that are open to experts: all in the database, or those that some runs asked."""

    def __init__(self, database: Database, runs: Collection[str] | None = None, clock: Callable[[], float] = time.time):
        self._database, self._runs, self._clock = database, runs, clock

    def open(self, questions: Sequence[Question], overlap: int) -> None:
        """Put reserved questions before the experts, in the order given; those that are open already stay as they are.

        A question that was withdrawn and is asked again keeps the answers that it had.
        """
        now = self._clock()
        with self._database.transaction() as connection:
            one_at_a_time(connection)
            for chunk in chunks(enumerate({q.question_id: q for q in questions}.values())):
                ids = [q.question_id for _, q in chunk]
                known = connection.execute(sa.select(ITEM.c.question_id).where(ITEM.c.question_id.in_(ids))).scalars()
                there = set(known)
                again = sa.and_(ITEM.c.question_id.in_(ids), ~ITEM.c.open)
                connection.execute(ITEM.update().where(again).values(open=True, opened_at=now, overlap=overlap))
                if fresh := [
                    {"question_id": q.question_id, "overlap": overlap, "opened_at": now, "place": i, "open": True}
                    for i, q in chunk
                    if q.question_id not in there
                ]:
                    connection.execute(ITEM.insert(), fresh)

    def drop(self, run_id: str, purpose: str, keep: Collection[str]) -> int:
        """Close what the run put up for a purpose beside `keep`, unless it was asked for something else too.

        What experts said of it stays with it, for when it is opened again; returns how many were open.
        """
        mine = sa.and_(CHARGE.c.run_id == run_id, CHARGE.c.purpose == purpose)
        charged = sa.select(CHARGE.c.question_id).where(CHARGE.c.question_id == ITEM.c.question_id)
        stale = sa.select(ITEM.c.question_id).where(
            ITEM.c.open, charged.where(mine).exists(), ~charged.where(~mine).exists()
        )
        with self._database.transaction() as connection:
            one_at_a_time(connection)
            found = set(connection.execute(stale).scalars()) - set(keep)
            for ids in chunks(sorted(found)):
                connection.execute(ITEM.update().where(ITEM.c.question_id.in_(ids)).values(open=False))
        return len(found)

    def lease(self, expert: str, seconds: float = LEASE_S) -> Lease | None:
        """The question for an expert to answer next, theirs for so long; None where there is none.

        One that the expert holds already comes back first, in the same order of the two responses; then those that
        others have answered, so that questions become complete.
        """
        for patient in (False, True, True) if self._database.locks_rows else (True,):
            with self._database.transaction() as connection:
                question_id = connection.scalar(self._next(expert, patient))
                # Between finding the question and having its lock others may have come, or this expert's other page.
                if question_id and self._free(connection, question_id, expert):
                    return self._give(connection, question_id, expert, seconds)
        return None

    def answer(
        self, expert: str, question_id: str, choice: Choice, ratings: Ratings | None = None, note: str = ""
    ) -> None:
        """Write an expert's answer down; the same answer once more changes nothing.

        Raises NoTicket, Answered (an answer is changed by undo alone) or Gone.
        """
        with self._database.transaction() as connection:
            is_open = self._lock(connection, question_id)
            ticket = self._ticket(connection, question_id, expert)
            if is_open is None or ticket is None:
                raise NoTicket("this question was not given to you; ask for the next one")
            vote = choice.vote(ticket.a_left)
            by_side = {_side(side, ticket.a_left): dict(values) for side, values in (ratings or {}).items()}
            said = json.dumps({"ratings": by_side, "note": note}, sort_keys=True)
            if ticket.vote is not None:
                if (ticket.vote, ticket.said) == (vote, said):
                    return
                raise Answered("you have answered this question already; undo first to change the answer")
            if not is_open or not self._room(connection, question_id, expert):
                raise Gone("the time for this question has run out and others have answered it; ask for the next one")
            values = {"vote": vote.value, "said": said, "answered_at": self._clock()}
            connection.execute(_of(TICKET.update(), question_id, expert).values(values))

    def undo(self, expert: str, seconds: float = LEASE_S) -> Lease:
        """Take back the last of the expert's answers that is not final; its question is theirs again for so long.

        Raises NoTicket where there is no answer, Gone where all are final: in the ledger, or skips whose place
        another expert has taken.
        """
        mine = sa.and_(_MINE.c.expert == expert, _MINE.c.vote.is_not(None), self._of_run(_MINE.c.question_id))
        taken = self._taken(ITEM.c.question_id, expert).correlate(ITEM).scalar_subquery()
        last = (
            sa.select(ITEM.c.question_id)
            .join(_MINE, _MINE.c.question_id == ITEM.c.question_id)
            .where(mine, ITEM.c.open, taken < ITEM.c.overlap)
            .order_by(_MINE.c.answered_at.desc())
            .limit(1)
            .with_for_update(of=ITEM)
        )
        with self._database.transaction() as connection:
            question_id = connection.scalar(last)
            if question_id is None and connection.scalar(sa.select(sa.func.count()).where(mine)) == 0:
                raise NoTicket("you have given no answer that could be taken back")
            # Before the lock was there another may have taken the place.
            if question_id is None or not self._room(connection, question_id, expert):
                raise Gone("what you said last is final: its question is settled, or another expert has it now")
            said = _said(self._ticket(connection, question_id, expert))
            return replace(self._give(connection, question_id, expert, seconds), said=said)

    def release(self, expert: str, question_id: str | None = None) -> int:
        """Give the expert's leases, or one of them, back to others; returns how many there were.

        Those on other runs' questions stay: the same person may be at work there.
        """
        held = sa.and_(TICKET.c.expert == expert, TICKET.c.vote.is_(None))
        mine = TICKET.delete().where(held, self._of_run(TICKET.c.question_id))
        with self._database.transaction() as connection:
            return connection.execute(
                mine.where(TICKET.c.question_id == question_id) if question_id else mine
            ).rowcount  # fmt: skip

    def progress(self, expert: str | None = None, question_ids: Collection[str] | None = None) -> dict[str, int]:
        """Counts of questions (asked, settled, open), of answers (wanted, given on all of them), and of leases.

        With an expert also what they answered and skipped, and what is left for them. Over all questions of this
        queue, or the given ones.
        """
        with self._database.transaction(reading=True) as connection:
            if question_ids is None:
                return self._progress(connection, expert, self._of_run(ITEM.c.question_id))
            found = [self._progress(connection, expert, ITEM.c.question_id.in_(ids)) for ids in chunks(question_ids)]
            keys = found[0] if found else self._progress(connection, expert, sa.false())
        return {key: sum(counts[key] for counts in found) for key in keys}

    def agreement(self, expert: str, last: int | None = None) -> dict[str, Any]:
        """How far the expert's answers, or the last so many, agree with others' on the same settled questions.

        See `votes.agreement`; with several others on a question each of them is compared. A question that is open
        does not count: whoever could still change an answer must not learn what others said.
        """
        mine = (
            sa.select(TICKET.c.question_id, TICKET.c.vote, TICKET.c.answered_at)
            .join(ITEM, sa.and_(ITEM.c.question_id == TICKET.c.question_id, ~ITEM.c.open))
            .where(TICKET.c.expert == expert, TICKET.c.vote != Vote.SKIP, self._of_run(TICKET.c.question_id))
        )
        recent = mine.order_by(TICKET.c.answered_at.desc()).limit(last).subquery() if last else mine.subquery()
        both = (
            sa.select(recent.c.vote, _OTHER.c.vote)
            .join(_OTHER, _OTHER.c.question_id == recent.c.question_id)
            .where(_OTHER.c.expert != expert, _OTHER.c.vote != Vote.SKIP)
        )
        with self._database.transaction(reading=True) as connection:
            return agreement([(Vote(mine), Vote(other)) for mine, other in connection.execute(both)])

    def experts(self) -> list[str]:
        """Who has answered a question, by name."""
        named = sa.select(TICKET.c.expert).where(TICKET.c.vote.is_not(None), self._of_run(TICKET.c.question_id))
        with self._database.transaction(reading=True) as connection:
            return sorted(set(connection.execute(named).scalars()))

    def still_open(self, question_ids: Collection[str]) -> dict[str, float]:
        """Of these questions the ones that are not settled, with the Unix time at which they were opened."""
        found: dict[str, float] = {}
        with self._database.transaction(reading=True) as connection:
            for ids in chunks(question_ids):
                rows = sa.select(ITEM.c.question_id, ITEM.c.opened_at).where(ITEM.c.question_id.in_(ids), ITEM.c.open)
                found.update({row.question_id: row.opened_at for row in connection.execute(rows)})
        return found

    def waiting(self) -> list[Waiting]:
        """The open questions that lack answers, in the order in which they were opened.

        Who has answered or skipped a question of this queue, or holds one, has come; of others it knows nothing.
        """
        lacking = (
            sa.select(ITEM.c.question_id, ITEM.c.overlap)
            .where(ITEM.c.open, self._of_run(ITEM.c.question_id))
            .order_by(ITEM.c.opened_at, ITEM.c.place)
        )
        live = sa.or_(TICKET.c.vote.is_not(None), TICKET.c.until > self._clock())
        columns = (TICKET.c.question_id, TICKET.c.expert, TICKET.c.vote)
        tickets = sa.select(*columns).where(live, self._of_run(TICKET.c.question_id))
        with self._database.transaction(reading=True) as connection:
            items, rows = connection.execute(lacking).all(), connection.execute(tickets).all()
        come = sorted({row.expert for row in rows})
        votes: dict[str, dict[str, str]] = {item.question_id: {} for item in items}
        for row in rows:
            if row.vote is not None and row.question_id in votes:
                votes[row.question_id][row.expert] = row.vote
        found = []
        for item in items:
            had = votes[item.question_id]
            skipped = tuple(sorted(name for name, vote in had.items() if vote == Vote.SKIP))
            answered = tuple(sorted(set(had) - set(skipped)))
            may = tuple(name for name in come if name not in had)
            if len(answered) < item.overlap:
                found.append(Waiting(item.question_id, item.overlap - len(answered), answered, skipped, may))
        return found

    def settle(self, question_ids: Collection[str], *, undo_s: float, price: float = 0.0) -> None:
        """Write the verdicts of complete questions into the ledger and close them.

        A question is complete when `overlap` experts answered it and the last answer is `undo_s` seconds old. `price`
        is an answer's.
        """
        final = self._clock() - undo_s
        for ids in chunks(sorted(question_ids)):
            with self._database.transaction() as connection:
                answers = []
                for item in connection.execute(self._locked(ids, ITEM.c.overlap)).all():
                    votes = self._votes(connection, item.question_id)
                    # Before the lock was there an answer may have been taken back.
                    if len(votes) >= item.overlap and votes[-1].answered_at <= final:
                        answers.append(_verdict(item.question_id, votes, price))
                self._close(connection, answers)

    def withdraw(self, question_ids: Collection[str], reason: str, price: float = 0.0) -> int:
        """Close questions whose time is over; returns how many are failures in the ledger then, `reason` their error.

        A question whose missing votes could not change the verdict has that verdict.
        """
        failed = 0
        for ids in chunks(sorted(question_ids)):
            with self._database.transaction() as connection:
                answers = []
                for item in connection.execute(self._locked(ids, 0)).all():
                    votes = self._votes(connection, item.question_id)
                    if decided([Vote(row.vote) for row in votes], item.overlap):
                        answers.append(_verdict(item.question_id, votes, price))
                    else:
                        answers.append(Answer(item.question_id, False, None, error=reason))
                        failed += 1
                self._close(connection, answers)
        return failed

    def _of_run(self, question_id: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        if self._runs is None:
            return sa.true()
        return sa.exists().where(CHARGE.c.question_id == question_id, CHARGE.c.run_id.in_(self._runs))

    def _taken(self, question_id: Any, expert: str) -> Any:
        """How many other experts answered the question or hold a lease on it that runs."""
        busy = sa.or_(_OTHER.c.vote != Vote.SKIP, sa.and_(_OTHER.c.vote.is_(None), _OTHER.c.until > self._clock()))
        mine = sa.and_(_OTHER.c.question_id == question_id, _OTHER.c.expert != expert)
        return sa.select(sa.func.count()).select_from(_OTHER).where(mine, busy)

    def _next(self, expert: str, patient: bool) -> sa.Select[Any]:
        """The id of the expert's next question, locked; one that another process has locked is passed over or not."""
        mine = sa.and_(_MINE.c.question_id == ITEM.c.question_id, _MINE.c.expert == expert)
        taken = self._taken(ITEM.c.question_id, expert).correlate(ITEM).scalar_subquery()
        return (
            sa.select(ITEM.c.question_id)
            .select_from(ITEM.outerjoin(_MINE, mine))
            .where(ITEM.c.open, _MINE.c.vote.is_(None), taken < ITEM.c.overlap, self._of_run(ITEM.c.question_id))
            .order_by(_MINE.c.leased_at.desc().nulls_last(), taken.desc(), ITEM.c.opened_at, ITEM.c.place)
            .limit(1)
            .with_for_update(of=ITEM, skip_locked=not patient)
        )

    def _lock(self, connection: sa.Connection, question_id: str) -> bool | None:
        """Lock a question; whether it is open, None where there is none."""
        row = sa.select(ITEM.c.open).where(ITEM.c.question_id == question_id).with_for_update()
        return connection.scalar(row)

    def _locked(self, ids: Sequence[str], votes: Any) -> sa.Select[Any]:
        """Of some questions the open ones with so many votes or more, locked in one order for all."""
        given = sa.and_(_OTHER.c.question_id == ITEM.c.question_id, _OTHER.c.vote != Vote.SKIP)
        count = sa.select(sa.func.count()).select_from(_OTHER).where(given).correlate(ITEM).scalar_subquery()
        wanted = sa.select(ITEM.c.question_id, ITEM.c.overlap).where(ITEM.c.question_id.in_(ids), ITEM.c.open)
        return wanted.where(count >= votes).order_by(ITEM.c.question_id).with_for_update()

    def _free(self, connection: sa.Connection, question_id: str, expert: str) -> bool:
        """Whether a locked question is for the expert to answer."""
        ticket = self._ticket(connection, question_id, expert)
        return (ticket is None or ticket.vote is None) and self._room(connection, question_id, expert)

    def _room(self, connection: sa.Connection, question_id: str, expert: str) -> bool:
        overlap = sa.select(ITEM.c.overlap).where(ITEM.c.question_id == question_id)
        return (connection.scalar(self._taken(question_id, expert)) or 0) < (connection.scalar(overlap) or 0)

    def _ticket(self, connection: sa.Connection, question_id: str, expert: str) -> sa.Row[Any] | None:
        return connection.execute(_of(sa.select(TICKET), question_id, expert)).one_or_none()

    def _give(self, connection: sa.Connection, question_id: str, expert: str, seconds: float) -> Lease:
        """Lease a locked question to an expert, in the order of the first time; an answer that it had is taken back."""
        ticket, now = self._ticket(connection, question_id, expert), self._clock()
        a_left = ticket.a_left if ticket else bool(int(content_id("order", question_id, expert), 16) % 2)
        running = ticket is not None and ticket.vote is None and ticket.until > now
        since = ticket.leased_at if ticket and running else now  # a reload does not begin the work anew
        values = {"leased_at": since, "until": now + seconds, "answered_at": None, "vote": None, "said": None}
        if ticket:
            connection.execute(_of(TICKET.update(), question_id, expert).values(values))
        else:
            who = {"question_id": question_id, "expert": expert, "a_left": a_left}
            connection.execute(TICKET.insert(), who | values)
        text = sa.select(QUESTION.c.payload).where(QUESTION.c.question_id == question_id)
        shown = json.loads(connection.scalar(text) or "{}")
        left, right = (shown["a"], shown["b"]) if a_left else (shown["b"], shown["a"])
        return Lease(question_id, shown["messages"], left, right, now + seconds)

    def _votes(self, connection: sa.Connection, question_id: str) -> list[sa.Row[Any]]:
        """The votes on a question, in the order in which they came."""
        given = sa.and_(TICKET.c.question_id == question_id, TICKET.c.vote != Vote.SKIP)
        rows = sa.select(TICKET).where(given).order_by(TICKET.c.answered_at, TICKET.c.expert)
        return list(connection.execute(rows))

    def _close(self, connection: sa.Connection, answers: Sequence[Answer]) -> None:
        if answers:
            write_answers(connection, answers)
            ids = [answer.question_id for answer in answers]
            connection.execute(ITEM.update().where(ITEM.c.question_id.in_(ids)).values(open=False))

    def _progress(
        self, connection: sa.Connection, expert: str | None, wanted: sa.ColumnElement[bool]
    ) -> dict[str, int]:
        items = sa.select(
            sa.func.count().label("questions"),
            _sum(sa.case((ITEM.c.open, 0), else_=1)).label("settled"),
            _sum(ITEM.c.overlap).label("wanted"),
        ).where(wanted)
        live = sa.and_(TICKET.c.vote.is_(None), TICKET.c.until > self._clock(), ITEM.c.open)
        tickets = (
            sa.select(
                _sum(sa.case((TICKET.c.vote != Vote.SKIP, 1), else_=0)).label("given"),
                _sum(sa.case((live, 1), else_=0)).label("leased"),
                _sum(_by(expert, TICKET.c.vote != Vote.SKIP)).label("answered"),
                _sum(_by(expert, TICKET.c.vote == Vote.SKIP)).label("skipped"),
            )
            .join_from(TICKET, ITEM)
            .where(wanted)
        )
        counts = dict(connection.execute(items).mappings().one()) | dict(
            connection.execute(tickets).mappings().one()
        )  # fmt: skip
        counts["open"] = counts["questions"] - counts["settled"]
        if expert is None:
            return {key: int(value) for key, value in counts.items() if key not in ("answered", "skipped")}
        mine = sa.and_(_MINE.c.question_id == ITEM.c.question_id, _MINE.c.expert == expert)
        taken = self._taken(ITEM.c.question_id, expert).correlate(ITEM).scalar_subquery()
        free = sa.and_(wanted, ITEM.c.open, _MINE.c.vote.is_(None), taken < ITEM.c.overlap)
        left = sa.select(sa.func.count()).select_from(ITEM.outerjoin(_MINE, mine)).where(free)
        return {key: int(value) for key, value in counts.items()} | {"left": connection.scalar(left) or 0}


def _sum(values: sa.ColumnElement[Any]) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(values), 0)


def _by(expert: str | None, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.case((sa.and_(TICKET.c.expert == (expert or ""), condition), 1), else_=0)


def _of(statement: Any, question_id: str, expert: str) -> Any:
    return statement.where(TICKET.c.question_id == question_id, TICKET.c.expert == expert)


def _side(side: str, a_left: bool) -> str:
    return "a" if (side == "left") == a_left else "b"


def _said(ticket: sa.Row[Any] | None) -> Said | None:
    """The answer in a ticket, turned to the sides that its expert saw."""
    if ticket is None or ticket.vote is None:
        return None
    said = json.loads(ticket.said)
    ratings = {side: said["ratings"].get(_side(side, ticket.a_left), {}) for side in ("left", "right")}
    return Said(Vote(ticket.vote).choice(ticket.a_left), ratings, said["note"])


def _verdict(question_id: str, votes: Sequence[sa.Row[Any]], price: float) -> Answer:
    """The ledger's answer to a question from its votes; each expert's stays beside the verdict."""
    verdict, margin = consensus([Vote(row.vote) for row in votes])
    experts = [
        {
            "expert": row.expert,
            "vote": row.vote,
            "a_left": bool(row.a_left),
            **json.loads(row.said),
            "seconds": round(row.answered_at - row.leased_at, 1),
        }
        for row in votes
    ]
    return Answer(
        question_id,
        ok=True,
        answer={"verdict": verdict, "margin": margin, "experts": experts},
        attempts=len(votes),
        latency_s=sum(row.answered_at - row.leased_at for row in votes),
        cost=price * len(votes),
        who=", ".join(row.expert for row in votes),
    )
