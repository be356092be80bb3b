"""The label ledger and the expert queue on a real PostgreSQL: eight writers, and every promise that holds on SQLite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_server import missing, postgres, promised

from psyray.active.ledger import Ledger

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if lacking := missing():
        (pytest.fail if promised() else pytest.skip)(lacking)
    with postgres() as found:
        yield found


def test_every_promise_of_the_ledger_and_the_queue_holds_on_postgres(url: str) -> None:
    files = ["tests/unit/test_ledger.py", "tests/unit/test_queue.py"]
    environment = os.environ | {"PSYRAY_TEST_LEDGER": url, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


WRITER = """
import sys
from psyray.active.ledger import Answer, Ledger, Question
url, who = sys.argv[1], sys.argv[2]
ledger = Ledger(url)
ledger.reserve("eight", who, [], 0)  # all have the tables before the race begins
print("ready", flush=True)
sys.stdin.readline()
for start in range(0, 200, 8):
    asked = [Question(f"eight-{i}", "comparison", "judge", "rubric", {}) for i in range(start, start + 8)]
    reserved = ledger.reserve("eight", "round-1", asked, 150)
    ledger.answer(Answer(q.question_id, True, {"who": who}, cost=1.0, who=who) for q in reserved.to_ask)
    for q in reserved.to_ask:
        print(q.question_id, flush=True)
"""


def test_eight_writers_lose_no_label_and_double_none(url: str) -> None:
    command = [sys.executable, "-c", WRITER, url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, f"writer-{i}"], **pipes) for i in range(8)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n", writer.stderr.read()
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    told = set()
    for writer in writers:
        out, err = writer.communicate(timeout=120)
        assert writer.returncode == 0, err
        told |= set(out.split())
    ledger = Ledger(url)
    [row] = ledger.summary("eight")
    assert row["bought"] == row["asked"] == row["answered"] == 150 and row["cost"] == 150.0  # 1.0 each: none twice
    answers = ledger.answers(f"eight-{i}" for i in range(200))
    assert set(answers) == told and len(told) == 150
    assert all(answer.answer == {"who": answer.who} for answer in answers.values())  # no row mixes two writers
    ledger.close()
