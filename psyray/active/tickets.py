"""What every part of the expert queue stands on: the questions of some runs, and whose they are at this moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import sqlalchemy as sa

from psyray.active.database import CHARGE, TICKET, Database
from psyray.active.votes import Vote

OTHER = TICKET.alias("other")
MINE = TICKET.alias("mine")


class Tickets:
    """The questions that are open to experts: all in the database, or those that some runs asked."""

    def __init__(self, database: Database, runs: Collection[str] | None = None, clock: Callable[[], float] = time.time):
        self._database, self._runs, self._clock = database, runs, clock

    def _of_run(self, question_id: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        if self._runs is None:
            return sa.true()
        return sa.exists().where(CHARGE.c.question_id == question_id, CHARGE.c.run_id.in_(self._runs))

    def _taken(self, question_id: Any, expert: str) -> Any:
        """How many other experts answered the question or hold a lease on it that runs."""
        busy = sa.or_(OTHER.c.vote != Vote.SKIP, sa.and_(OTHER.c.vote.is_(None), OTHER.c.until > self._clock()))
        mine = sa.and_(OTHER.c.question_id == question_id, OTHER.c.expert != expert)
        return sa.select(sa.func.count()).select_from(OTHER).where(mine, busy)
