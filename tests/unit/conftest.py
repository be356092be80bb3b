"""Fixtures of the tests of oracles: where labels are bought, and a stage at work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from psyray.active.ledger import Ledger
from psyray.data.judge import Desk
from psyray.rubric import load_rubric
from psyray.run import Folder
from psyray.sections.data import JudgeSection


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """With a ledger of its own, and a judge that is never asked."""
    ledger = Ledger(f"sqlite:///{tmp_path}/labels.db")
    return Desk(SimpleNamespace(id="named"), load_rubric("counselling"), ledger, "run", JudgeSection())  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "stage").mkdir()
    return Folder(tmp_path / "stage")
