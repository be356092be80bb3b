"""The label ledger: charges, restarts, reuse, failures, and many writers at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_ledger import fresh_url, sql

from psyray.active.database import CHUNK, LedgerError
from psyray.active.ledger import Answer, Ledger, Question, Reservation, ledger_url
from psyray.errors import PsyrayError


def questions(*numbers: int) -> list[Question]:
    return [Question(f"q{i}", "comparison", "judge", "rubric", {"a": "x", "i": i}) for i in numbers]


def won(number: int, letter: str = "A", cost: float = 0.5) -> Answer:
    return Answer(f"q{number}", True, {"verdict": letter}, attempts=2, latency_s=0.25, cost=cost, who="judge")


def lost(number: int, error: str = "timeout") -> Answer:
    return Answer(f"q{number}", False, None, error=error, cost=0.125)


def ids(reservation: Reservation) -> tuple[list[str], list[str], list[str]]:
    to_ask, refused = ([q.question_id for q in asked] for asked in (reservation.to_ask, reservation.refused))
    return to_ask, list(reservation.answered), refused


@pytest.fixture
def url(tmp_path: Path) -> str:
    return fresh_url(tmp_path)


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    opened = Ledger(url)
    yield opened
    opened.close()


def test_an_answer_comes_back_whole(ledger: Ledger) -> None:
    ledger.reserve("run", "judge", questions(1, 2), None)
    ledger.answer([won(1), lost(2)])
    assert ledger.answers(["q1", "q2", "q3"]) == {"q1": won(1), "q2": lost(2)}


def test_counts_are_of_the_questions_that_are_named_and_of_this_run(ledger: Ledger) -> None:
    ledger.reserve("other", "round-1", questions(3), None)
    ledger.answer([won(3)])
    ledger.reserve("run", "round-1", questions(1, 2, 3), None)
    ledger.reserve("run", "round-2", questions(4), None)
    ledger.answer([won(1), lost(2)])
    counted = ledger.counts("run", "round-1", ["q1", "q2", "q3", "q4", "q9", "q1"])
    assert counted == {"asked": 3, "bought": 2, "reused": 1, "answered": 2}
    assert ledger.counts("run", "round-1", ["q2"]) == {"asked": 1, "bought": 1, "reused": 0, "answered": 0}


def test_what_is_asked_is_a_row_first_and_what_is_what_is_refused_is_none(ledger: Ledger, url: str) -> None:
    asked = Question("q1", "rating", "judge", "rubric", {"text": "\ud83d\x00é"}, "drts", {"value": 1.5})
    ledger.reserve("run", "round-1", [asked, *questions(2)], 1)
    [row] = sql(url, "select question_id, kind, oracle, rubric, payload, status from question")
    [charge] = sql(url, "select run_id, purpose, question_id, bought, strategy, scores from charge")
    assert row[:4] + row[5:] == ("q1", "rating", "judge", "rubric", "asked")
    assert json.loads(row[4]) == asked.payload
    assert charge == ("run", "round-1", "q1", 1, "drts", '{"value": 1.5}')


def test_the_budget_is_kept_over_calls_and_in_the_order_given(ledger: Ledger) -> None:
    assert ids(ledger.reserve("run", "judge", questions(3, 1, 2), 2)) == (["q3", "q1"], [], ["q2"])
    assert ids(ledger.reserve("run", "judge", questions(2, 3), 2)) == (["q3"], [], ["q2"])
    assert ids(ledger.reserve("run", "judge", questions(2, 4), 3)) == (["q2"], [], ["q4"])
    assert ids(ledger.reserve("run", "round-1", questions(4), 1)) == (["q4"], [], [])  # a budget of its own
    assert ids(ledger.reserve("run", "judge", questions(5), 0)) == ([], [], ["q5"])
    assert ledger.spent("run") == {"judge": 3, "round-1": 1}
    assert ledger.spent("other") == {}


def test_a_question_given_twice_is_charged_once(ledger: Ledger) -> None:
    assert ids(ledger.reserve("run", "judge", questions(1, 1, 2), 2)) == (["q1", "q2"], [], [])


def test_a_restart_gets_open_questions_back_for_nothing(ledger: Ledger, url: str) -> None:
    ledger.reserve("run", "judge", questions(1, 2, 3), 3)
    ledger.answer([won(2), lost(3)])
    ledger.close()
    again = Ledger(url)
    reservation = again.reserve("run", "judge", questions(1, 2, 3), 3)
    assert ids(reservation) == (["q1"], ["q2", "q3"], [])
    assert reservation.answered == {"q2": won(2), "q3": lost(3)}
    assert again.spent("run") == {"judge": 3}
    again.close()


def test_an_answer_is_free_to_a_later_run(ledger: Ledger) -> None:
    ledger.reserve("first", "judge", questions(1, 2), None)
    ledger.answer([won(1), won(2)])
    reservation = ledger.reserve("second", "judge", questions(1, 2, 3), 1)
    assert ids(reservation) == (["q3"], ["q1", "q2"], [])
    [row] = ledger.summary("second")
    counts = {"asked": 3, "bought": 1, "reused": 2, "answered": 2, "failed": 0, "open": 1}
    assert row == {"purpose": "judge", **counts, "cost": 0.0}


def test_another_purpose_of_the_run_does_not_pay_again(ledger: Ledger) -> None:
    ledger.reserve("run", "judge", questions(1, 2, 3), None)
    ledger.answer([won(1), lost(2)])
    reservation = ledger.reserve("run", "round-1", questions(1, 2, 3), 0)
    assert ids(reservation) == (["q3"], ["q1", "q2"], [])
    assert ledger.spent("run") == {"judge": 3, "round-1": 0}


def test_an_open_question_of_another_run_is_charged_and_asked_as_well(ledger: Ledger) -> None:
    ledger.reserve("first", "judge", questions(1), None)
    assert ids(ledger.reserve("second", "judge", questions(1), 0)) == ([], [], ["q1"])
    assert ids(ledger.reserve("second", "judge", questions(1), 1)) == (["q1"], [], [])
    ledger.answer([won(1, "B")])
    ledger.answer([won(1, "A")])
    assert ledger.reserve("first", "judge", questions(1), 0).answered["q1"] == won(1, "B")
    assert ledger.reserve("second", "judge", questions(1), 0).answered["q1"] == won(1, "B")


def test_a_failure_is_final_for_its_run_and_may_be_bought_by_a_later_one(ledger: Ledger) -> None:
    ledger.reserve("first", "judge", questions(1), 5)
    ledger.answer([lost(1)])
    assert ids(ledger.reserve("first", "judge", questions(1), 5)) == ([], ["q1"], [])

    assert ids(ledger.reserve("second", "judge", questions(1), 5)) == (["q1"], [], [])
    assert ids(ledger.reserve("second", "judge", questions(1), 5)) == (["q1"], [], [])  # restart: open, paid
    assert ledger.answers(["q1"]) == {}
    assert not ledger.reserve("first", "judge", questions(1), 5).answered["q1"].ok  # still its failure
    [first], [second] = ledger.summary("first"), ledger.summary("second")
    assert (first["failed"], first["open"], second["failed"], second["open"]) == (1, 0, 0, 1)

    ledger.answer([won(1)])
    for run in ("first", "second"):
        answer = ledger.reserve(run, "judge", questions(1), 5).answered["q1"]
        assert (answer.ok, answer.answer, answer.error) == (True, {"verdict": "A"}, "")
        assert (answer.attempts, answer.cost) == (3, 0.625)  # both asks
        assert ledger.spent(run) == {"judge": 1}


def test_the_first_answer_wins(ledger: Ledger) -> None:
    ledger.reserve("run", "judge", questions(1), None)
    ledger.answer([won(1, "A"), won(1, "B")])
    ledger.answer([won(1, "B")])
    ledger.answer([lost(1)])
    assert ledger.answers(["q1"]) == {"q1": won(1, "A")}
    assert ledger.summary("run")[0]["cost"] == 0.5


def test_an_answer_replaces_a_failure_and_a_second_failure_does_not(ledger: Ledger) -> None:
    ledger.reserve("run", "judge", questions(1), None)
    ledger.answer([lost(1, "first"), lost(1, "second")])
    assert ledger.answers(["q1"]) == {"q1": lost(1, "first")}
    ledger.answer([won(1)])
    assert ledger.answers(["q1"])["q1"].answer == {"verdict": "A"}


def test_an_answer_to_an_unknown_question_raises_and_writes_nothing(ledger: Ledger) -> None:
    ledger.reserve("run", "judge", questions(1), None)
    with pytest.raises(LedgerError, match="never reserved: q9"):
        ledger.answer([won(1), won(9)])
    assert ledger.answers(["q1"]) == {}


def test_an_answer_without_one_is_refused() -> None:
    with pytest.raises(ValueError, match="question q1"):
        Answer("q1", True, None)


def test_a_failure_keeps_what_was_said(ledger: Ledger) -> None:
    ledger.reserve("run", "judge", questions(1), None)
    ledger.answer([Answer("q1", ok=False, answer={"raw_text": "seven?"}, error="no JSON")])
    kept = ledger.answers(["q1"])["q1"]
    assert not kept.ok and kept.answer == {"raw_text": "seven?"} and kept.error == "no JSON"


def test_one_id_for_two_questions_is_refused_and_nothing_is_charged(ledger: Ledger) -> None:
    ledger.reserve("run", "judge", questions(1), None)
    other = Question("q1", "comparison", "another judge", "rubric", {})
    with pytest.raises(LedgerError, match="question q1 is in the ledger as comparison by judge"):
        ledger.reserve("run", "judge", [*questions(2), other], None)
    assert ledger.spent("run") == {"judge": 1}


def test_more_questions_than_one_statement_holds(ledger: Ledger) -> None:
    many = questions(*range(2 * CHUNK + 1))
    assert len(ledger.reserve("run", "judge", many, 2 * CHUNK).to_ask) == 2 * CHUNK
    ledger.answer(won(i) for i in range(2 * CHUNK))
    assert len(ledger.answers(q.question_id for q in many)) == 2 * CHUNK
    assert ledger.summary("run")[0]["answered"] == 2 * CHUNK


def test_an_error_text_that_no_database_stores_is_kept_as_far_as_it_goes(ledger: Ledger) -> None:
    ledger.reserve("run", "judge", questions(1), None)
    ledger.answer([lost(1, "bad \x00 \ud83d byte")])
    assert ledger.answers(["q1"])["q1"].error == "bad ? ? byte"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("postgresql://user:s3cret@host:1x/db", "URL cannot be read"),
        ("user:s3cret@host", "URL cannot be read"),
        ("nosuch://user:s3cret@host/db?key=s3cret", r"nosuch://user:\*\*\*@host/db cannot be opened"),
    ],
)
def test_a_ledger_that_cannot_be_opened_says_where_and_hides_the_password(bad: str, said: str) -> None:
    with pytest.raises(LedgerError, match=said) as caught:
        Ledger(bad)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value, limit=0))


@pytest.mark.parametrize(
    "bad", ["postgresql+psycopg://u:s3cret@host/db", "postgresql+psycopg://u@host/db?password=s3cret"]
)
def test_a_password_in_the_configured_url_is_refused_before_a_run_folder_could_keep_it(
    bad: str, tmp_path: Path
) -> None:
    with pytest.raises(PsyrayError, match="set PGPASSWORD") as caught:
        ledger_url(bad, tmp_path / "run")
    assert "s3cret" not in str(caught.value)
    assert ledger_url("postgresql+psycopg://u@host/db", tmp_path / "run") == "postgresql+psycopg://u@host/db"
    assert ledger_url(None, tmp_path / "runs" / "one") == f"sqlite:///{tmp_path}/runs/labels.db"


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("not a database, whatever its name " * 10)
    with pytest.raises(LedgerError, match=r"note\.txt failed: file is not a database"):
        Ledger(f"sqlite:///{tmp_path}/note.txt")
    with pytest.raises(LedgerError, match=r"under\.db cannot be opened"):
        Ledger(f"sqlite:///{tmp_path}/note.txt/under.db")


def test_tables_of_another_version_are_refused(ledger: Ledger, url: str) -> None:
    sql(url, "update ledger set version = 99")
    with pytest.raises(LedgerError, match="version 99, not 1"):
        Ledger(url)


WRITER = """
import sys
from psyray.active.ledger import Answer, Ledger, Question
url, run, who = sys.argv[1:]
ledger = Ledger(url)
for start in range(0, 60, 5):
    asked = [Question(f"q{i}", "comparison", "judge", "rubric", {}) for i in range(start, start + 10)]
    reservation = ledger.reserve(run, "judge", asked, 40)
    ledger.answer(Answer(q.question_id, True, {"who": who}, cost=1.0, who=who) for q in reservation.to_ask)
    assert len(ledger.answers(q.question_id for q in asked)) >= len(reservation.to_ask)
"""


def test_many_writers_make_no_doubles_and_keep_the_budget(url: str) -> None:
    runs = ["x", "x", "y", "y"]  # all at once on a file that is not there yet
    command = [sys.executable, "-c", WRITER, url]
    writers = [
        subprocess.Popen([*command, run, f"writer-{i}"], stderr=subprocess.PIPE, text=True)
        for i, run in enumerate(runs)
    ]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said
    ledger = Ledger(url)
    assert ledger.spent("x")["judge"] <= 40
    assert ledger.spent("y")["judge"] <= 40
    for run in "xy":
        [row] = ledger.summary(run)
        assert row["asked"] == row["answered"] == row["bought"] + row["reused"]
        assert row["cost"] == row["bought"]  # each question was answered once, at 1.0
    answers = ledger.answers(f"q{i}" for i in range(65))
    assert 40 <= len(answers) <= 65
    assert all(a.answer == {"who": a.who} for a in answers.values())  # no row mixes two writers
    ledger.close()


KILLED = """
import sys, time
from psyray.active.ledger import Answer, Ledger, Question
ledger = Ledger(sys.argv[1])
asked = [Question(f"q{i}", "comparison", "judge", "rubric", {"a": "x", "i": i}) for i in range(3)]
ledger.reserve("run", "judge", asked, 3)
ledger.answer([Answer("q0", True, {"verdict": "A"})])
print("paid", flush=True)
time.sleep(120)
"""


def test_a_kill_between_reserve_and_answer_loses_and_repays_nothing(url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "paid\n"
        os.kill(process.pid, signal.SIGKILL)
    ledger = Ledger(url)
    assert ids(ledger.reserve("run", "judge", questions(0, 1, 2, 3), 3)) == (["q1", "q2"], ["q0"], ["q3"])
    assert ledger.spent("run") == {"judge": 3}
    ledger.close()


KILLED_INSIDE = """
import os, signal, sys
import psyray.active.ledger as module
ledger = module.Ledger(sys.argv[1])
write = module._charge_all
def write_and_die(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
module._charge_all = write_and_die
ledger.reserve("run", "judge", [module.Question("q1", "comparison", "judge", "rubric", {})], 1)
"""


def test_a_kill_inside_the_transaction_leaves_neither_question_nor_charge(url: str) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_INSIDE, url], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    ledger = Ledger(url)
    assert ledger.spent("run") == {}
    assert ids(ledger.reserve("run", "judge", questions(1), 1)) == (["q1"], [], [])
    ledger.close()
