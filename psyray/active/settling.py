"""What a round does with its questions: put them before the experts, and write what they said into the ledger."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from psyray.active.database import CHARGE, ITEM, TICKET, chunks, one_at_a_time
from psyray.active.ledger import Answer, Question, write_answers
from psyray.active.tickets import OTHER, Tickets
from psyray.active.votes import Vote, consensus, decided


class Settling(Tickets):
    """What a round does."""

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

    def still_open(self, question_ids: Collection[str]) -> dict[str, float]:
        """Of these questions the ones that are not settled, with the Unix time at which they were opened."""
        found: dict[str, float] = {}
        with self._database.transaction(reading=True) as connection:
            for ids in chunks(question_ids):
                rows = sa.select(ITEM.c.question_id, ITEM.c.opened_at).where(ITEM.c.question_id.in_(ids), ITEM.c.open)
                found.update({row.question_id: row.opened_at for row in connection.execute(rows)})
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

    def _locked(self, ids: Sequence[str], votes: Any) -> sa.Select[Any]:
        """Of some questions the open ones with so many votes or more, locked in one order for all."""
        given = sa.and_(OTHER.c.question_id == ITEM.c.question_id, OTHER.c.vote != Vote.SKIP)
        count = sa.select(sa.func.count()).select_from(OTHER).where(given).correlate(ITEM).scalar_subquery()
        wanted = sa.select(ITEM.c.question_id, ITEM.c.overlap).where(ITEM.c.question_id.in_(ids), ITEM.c.open)
        return wanted.where(count >= votes).order_by(ITEM.c.question_id).with_for_update()

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
