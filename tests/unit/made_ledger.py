"""An empty ledger for a test: a SQLite file, or the database that PSYRAY_TEST_LEDGER names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa

TABLES = ("expert_ticket", "expert_item", "charge", "question", "ledger")


def fresh_url(folder: Path) -> str:
    """A SQLite file in a folder that is not there yet, or what PSYRAY_TEST_LEDGER names, emptied."""
    if url := os.environ.get("PSYRAY_TEST_LEDGER", ""):
        for table in TABLES:
            sql(url, f"drop table if exists {table}")
    return url or f"sqlite:///{folder}/run/ledger.db"


def sql(url: str, statement: str) -> list[tuple[Any, ...]]:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        result = connection.execute(sa.text(statement))
        rows = [tuple(row) for row in result] if result.returns_rows else []
    engine.dispose()
    return rows
