"""How the queue stands: how far it is, how far people agree, and which questions wait for whom."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from psyray.active.database import ITEM, TICKET, chunks
from psyray.active.tickets import MINE, OTHER, Tickets
from psyray.active.votes import Vote, agreement


@dataclass(frozen=True)
class Waiting:
    """An open question that lacks answers, and what those who have come did with it."""

    question_id: str
    lacking: int
    answered: tuple[str, ...]
    skipped: tuple[str, ...]
    may: tuple[str, ...]  # who has come and has neither answered nor skipped it


class Standing(Tickets):
    """What is read, and changes nothing."""

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
            sa.select(recent.c.vote, OTHER.c.vote)
            .join(OTHER, OTHER.c.question_id == recent.c.question_id)
            .where(OTHER.c.expert != expert, OTHER.c.vote != Vote.SKIP)
        )
        with self._database.transaction(reading=True) as connection:
            return agreement([(Vote(mine), Vote(other)) for mine, other in connection.execute(both)])

    def experts(self) -> list[str]:
        """Who has answered a question, by name."""
        named = sa.select(TICKET.c.expert).where(TICKET.c.vote.is_not(None), self._of_run(TICKET.c.question_id))
        with self._database.transaction(reading=True) as connection:
            return sorted(set(connection.execute(named).scalars()))

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
        mine = sa.and_(MINE.c.question_id == ITEM.c.question_id, MINE.c.expert == expert)
        taken = self._taken(ITEM.c.question_id, expert).correlate(ITEM).scalar_subquery()
        free = sa.and_(wanted, ITEM.c.open, MINE.c.vote.is_(None), taken < ITEM.c.overlap)
        left = sa.select(sa.func.count()).select_from(ITEM.outerjoin(MINE, mine)).where(free)
        return {key: int(value) for key, value in counts.items()} | {"left": connection.scalar(left) or 0}


def _sum(values: sa.ColumnElement[Any]) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(values), 0)


def _by(expert: str | None, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.case((sa.and_(TICKET.c.expert == (expert or ""), condition), 1), else_=0)
