"""The label ledger's database: its tables, and transactions that hold on SQLite and PostgreSQL alike.

SQLite serves one machine: its file has to be on a local disk, for its locks do not work over a network. Where
several machines write, give a PostgreSQL URL (`postgresql+psycopg://user@host/database`); the password comes from
PGPASSWORD or ~/.pgpass, so that no run folder holds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from psyray.errors import PsyrayError

VERSION = 1  # of the tables below
CHUNK = 1000  # ids in one statement; databases bound the number of parameters
BUSY_S = 60  # how long a SQLite writer waits for its turn

T = TypeVar("T")

TABLES = sa.MetaData()
# One row. Whoever reserves locks it, so that reservations follow one another on every database.
LEDGER = sa.Table("ledger", TABLES, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
QUESTION = sa.Table(
    "question",
    TABLES,
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
CHARGE = sa.Table(
    "charge",
    TABLES,
    sa.Column("run_id", sa.String(1000), primary_key=True),  # may be a URI
    sa.Column("purpose", sa.String(128), primary_key=True),
    sa.Column("question_id", sa.ForeignKey(QUESTION.c.question_id), primary_key=True),
    sa.Column("ask", sa.Integer, nullable=False),  # question.asks at the time: behind it, this ask has failed
    sa.Column("bought", sa.Boolean, nullable=False),  # False: an answer that was there already
    sa.Column("strategy", sa.String(128), nullable=False),
    sa.Column("scores", sa.Text, nullable=False),  # JSON
    sa.Column("at", sa.Float(53), nullable=False),  # Unix seconds
)
_BY_QUESTION = sa.Index("charge_by_question", CHARGE.c.question_id)

# What people are asked: a question is open until enough of them answered, and then an answer in the ledger.
ITEM = sa.Table(
    "expert_item",
    TABLES,
    sa.Column("question_id", sa.ForeignKey(QUESTION.c.question_id), primary_key=True),
    sa.Column("overlap", sa.Integer, nullable=False),  # experts that must answer
    sa.Column("opened_at", sa.Float(53), nullable=False),  # Unix seconds
    sa.Column("place", sa.Integer, nullable=False),  # in the order of asking, among those opened together
    sa.Column("open", sa.Boolean, nullable=False, index=True),
)
# One expert's turn at a question: leased, then answered. The key is what makes it at most once.
TICKET = sa.Table(
    "expert_ticket",
    TABLES,
    sa.Column("question_id", sa.ForeignKey(ITEM.c.question_id), primary_key=True),
    sa.Column("expert", sa.String(64), primary_key=True, index=True),
    sa.Column("a_left", sa.Boolean, nullable=False),  # the order in which this expert sees the two
    sa.Column("leased_at", sa.Float(53), nullable=False),
    sa.Column("until", sa.Float(53), nullable=False),  # when the lease expires
    sa.Column("answered_at", sa.Float(53)),
    sa.Column("vote", sa.String(16)),  # of psyray.active.votes.Vote; null while leased
    sa.Column("said", sa.Text),  # JSON: ratings by side and principle, a note
)


class LedgerError(PsyrayError):
    """The ledger cannot be opened, or was asked to do what it must not."""


class Database:
    """The ledger's database at a URL; it makes the tables where they are not there yet."""

    def __init__(self, url: str):
        where = parsed(url)
        self._secret = str(where.password or "")
        self.shown = where.set(query={}).render_as_string(hide_password=True)
        self._engine = _engine(where, self.shown)
        self._reader = self._engine.execution_options(psyray_reading=True)
        self.locks_rows = self._engine.dialect.name != "sqlite"  # which has one writer at a time
        with self.transaction() as connection:
            if self._engine.dialect.name == "postgresql":  # two that create the tables at once would collide
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7073797261)"))
            TABLES.create_all(connection)
            _BY_QUESTION.create(connection, checkfirst=True)  # on tables that were there before it
            version = connection.scalar(sa.select(LEDGER.c.version))
            if version is None:
                connection.execute(LEDGER.insert(), {"version": VERSION})
            elif version != VERSION:
                raise LedgerError(f"the label ledger at {self.shown} has version {version}, not {VERSION}")

    def close(self) -> None:
        """Let go of the connections; the next transaction opens new ones."""
        self._engine.dispose()

    @contextmanager
    def transaction(self, reading: bool = False) -> Iterator[sa.Connection]:
        """One transaction; what the database says becomes a LedgerError that holds no password and no row."""
        try:
            with (self._reader if reading else self._engine).begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            said = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
            said = said.replace(self._secret, "***") if self._secret else said
            raise LedgerError(f"the label ledger at {self.shown} failed: {said}") from None


def one_at_a_time(connection: sa.Connection) -> None:
    """Wait for one's turn among all who reserve or open questions, until the transaction ends."""
    connection.execute(sa.select(LEDGER.c.version).with_for_update())


def parsed(url: str) -> sa.URL:
    """The parts of a database URL; LedgerError where it is none."""
    try:
        return sa.make_url(url)
    except (ArgumentError, ValueError):  # their texts may hold the password
        raise LedgerError(
            "the label ledger's URL cannot be read; it is like sqlite:///runs/demo/ledger.db "
            "or postgresql+psycopg://user@host/database"
        ) from None


def lacking(url: str) -> bool:
    """Whether the database is a SQLite file that is not there; opening it would make one."""
    there = parsed(url)
    return there.get_backend_name() == "sqlite" and not Path(there.database or "").exists()


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


def chunks(things: Iterable[T]) -> Iterator[list[T]]:
    """The things in lists that one statement can hold."""
    listed = list(things)
    return (listed[i : i + CHUNK] for i in range(0, len(listed), CHUNK))
