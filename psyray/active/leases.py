"""Handing questions out: a lease, an answer, and taking one back, each expert by themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from psyray.active.database import ITEM, QUESTION, TICKET
from psyray.active.tickets import MINE, Tickets
from psyray.active.votes import Choice, Vote
from psyray.errors import PsyrayError
from psyray.records import Message, content_id

LEASE_S = 900.0
Ratings = Mapping[str, Mapping[str, float]]  # by "left" and "right", then by principle


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


class Leases(Tickets):
    """What an expert does."""

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
        mine = sa.and_(MINE.c.expert == expert, MINE.c.vote.is_not(None), self._of_run(MINE.c.question_id))
        taken = self._taken(ITEM.c.question_id, expert).correlate(ITEM).scalar_subquery()
        last = (
            sa.select(ITEM.c.question_id)
            .join(MINE, MINE.c.question_id == ITEM.c.question_id)
            .where(mine, ITEM.c.open, taken < ITEM.c.overlap)
            .order_by(MINE.c.answered_at.desc())
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

    def _next(self, expert: str, patient: bool) -> sa.Select[Any]:
        """The id of the expert's next question, locked; one that another process has locked is passed over or not."""
        mine = sa.and_(MINE.c.question_id == ITEM.c.question_id, MINE.c.expert == expert)
        taken = self._taken(ITEM.c.question_id, expert).correlate(ITEM).scalar_subquery()
        return (
            sa.select(ITEM.c.question_id)
            .select_from(ITEM.outerjoin(MINE, mine))
            .where(ITEM.c.open, MINE.c.vote.is_(None), taken < ITEM.c.overlap, self._of_run(ITEM.c.question_id))
            .order_by(MINE.c.leased_at.desc().nulls_last(), taken.desc(), ITEM.c.opened_at, ITEM.c.place)
            .limit(1)
            .with_for_update(of=ITEM, skip_locked=not patient)
        )

    def _lock(self, connection: sa.Connection, question_id: str) -> bool | None:
        """Lock a question; whether it is open, None where there is none."""
        row = sa.select(ITEM.c.open).where(ITEM.c.question_id == question_id).with_for_update()
        return connection.scalar(row)

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
