"""The expert queue: leases, answers, undo, consensus, several experts at a time, and kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from made_ledger import fresh_url, sql

from psyray.active.leases import Answered, Gone, Lease, NoTicket
from psyray.active.ledger import Ledger, Question
from psyray.active.queue import ExpertQueue
from psyray.active.votes import Choice, Vote, agreement, consensus, decided
from psyray.records import Verdict

A, B, TIE, HARMFUL = Vote.A, Vote.B, Vote.TIE, Vote.HARMFUL


class Clock:
    """Time that passes when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Place:
    """A ledger with open questions, and their queue."""

    def __init__(self, url: str) -> None:
        self.url, self.clock, self.ledger = url, Clock(), Ledger(url)
        self.queue = ExpertQueue(self.ledger.database, ["run"], self.clock)

    def ask(self, count: int, overlap: int = 1, run: str = "run", start: int = 0) -> list[str]:
        asked = questions(start, start + count)
        self.queue.open(self.ledger.reserve(run, "round-1", asked, None).to_ask, overlap)
        return [q.question_id for q in asked]

    def say(self, expert: str, choice: str | Choice = Choice.TIE) -> str:
        """The expert answers the next question: with a choice, or for the response whose text is given."""
        lease = self.queue.lease(expert)
        assert lease is not None
        self.queue.answer(expert, lease.question_id, choice_of(lease, choice))
        self.clock.now += 1
        return lease.question_id


def questions(start: int, end: int) -> list[Question]:
    said = [{"role": "user", "content": "I cannot sleep."}]
    payloads = [{"messages": said, "a": "good", "b": f"bad {i}"} for i in range(start, end)]
    return [Question(f"q{i}", "comparison", "experts", "r", p, "drts") for i, p in enumerate(payloads, start)]


def choice_of(lease: Lease, text: str | Choice) -> Choice:
    if isinstance(text, Choice):
        return text
    return Choice.LEFT if lease.left == text else Choice.RIGHT


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(fresh_url(tmp_path))
    yield made
    made.ledger.close()


@pytest.mark.parametrize(
    ("votes", "verdict", "margin"),
    [
        ([A], Verdict.A, 1.0), ([A, B], Verdict.TIE, 0.0), ([A, B, B], Verdict.B, -1 / 3),
        ([A, B, TIE], Verdict.TIE, 0.0), ([A, A, TIE, TIE], Verdict.TIE, 0.5), ([TIE, TIE, A], Verdict.TIE, 1 / 3),
        ([A, A, HARMFUL], Verdict.INVALID, 0.0),
    ],
)  # fmt: skip
def test_a_majority_decides_and_harm_vetoes(votes, verdict, margin):
    assert consensus(votes) == (verdict, pytest.approx(margin))


def test_a_verdict_is_decided_when_no_vote_to_come_could_change_it():
    assert decided([A, A], 3) and decided([A, B, TIE], 3) and decided([HARMFUL], 3)
    assert not decided([A], 3) and not decided([A, B], 3) and not decided([], 1) and not decided([A, A], 4)


def test_agreement_by_hand():
    # 4 of 6 equal; by chance (3*3 + 2*2 + 1*1) / 36: kappa = (2/3 - 14/36) / (1 - 14/36) = 5/11
    votes = [(A, A), (A, A), (A, B), (B, B), (B, A), (TIE, TIE)]
    found = agreement(votes)
    assert (found["compared"], found["agree"], found["kappa"]) == (6, pytest.approx(4 / 6), pytest.approx(5 / 11))
    assert agreement([]) == {"compared": 0, "agree": None, "kappa": None}
    assert agreement([(A, A)]) == {"compared": 1, "agree": 1.0, "kappa": None}


def test_left_and_right_are_what_the_expert_saw():
    assert [Choice.LEFT.vote(True), Choice.LEFT.vote(False)] == [A, B]
    assert [Choice.RIGHT.vote(True), Choice.RIGHT.vote(False)] == [B, A]
    assert Choice.TIE.vote(True) is TIE and Choice.HARMFUL.vote(False) is HARMFUL


def test_an_answer_reaches_the_ledger_with_all_that_belongs_to_it(place: Place):
    [question] = place.ask(1)
    lease = place.queue.lease("anna", 60)
    assert lease is not None and {lease.left, lease.right} == {"good", "bad 0"} and lease.until == 1060
    place.clock.now += 2
    assert place.queue.lease("anna", 60) != lease  # a reload: the same for longer, and the work goes on
    place.clock.now += 10
    good, bad = ("left", "right") if lease.left == "good" else ("right", "left")
    place.queue.answer("anna", question, Choice(good), {good: {"empathy": 5}, bad: {"empathy": 2}}, "warm")
    place.queue.settle([question], undo_s=0, price=1.5)
    answer = place.ledger.answers([question])[question]
    assert answer.ok and (answer.who, answer.cost, answer.latency_s, answer.attempts) == ("anna", 1.5, 12, 1)
    assert answer.answer == {
        "verdict": "A", "margin": 1.0,
        "experts": [{"expert": "anna", "vote": "A", "a_left": lease.left == "good", "note": "warm", "seconds": 12,
                     "ratings": {"a": {"empathy": 5}, "b": {"empathy": 2}}}],
    }  # fmt: skip
    assert place.queue.lease("ben") is None and place.queue.still_open([question]) == {}


def test_orders_differ_between_experts_and_questions_and_stay_as_they_are(place: Place):
    place.ask(40, overlap=2)
    first = {}
    for expert in ("anna", "ben"):
        while lease := place.queue.lease(expert):
            assert place.queue.lease(expert) == lease  # a reload shows the same, in the same order
            first[expert, lease.question_id] = lease.left == "good"
            place.queue.answer(expert, lease.question_id, Choice.TIE)
    assert len(first) == 80 and 20 < sum(first.values()) < 60
    assert any(first["anna", f"q{i}"] != first["ben", f"q{i}"] for i in range(40))


def test_no_more_experts_hold_a_question_than_must_answer_it(place: Place):
    place.ask(2)
    held = [place.queue.lease(expert, 60) for expert in ("anna", "ben", "cleo")]
    assert [lease and lease.question_id for lease in held] == ["q0", "q1", None]
    assert place.queue.release("anna") == 1
    lease = place.queue.lease("cleo", 60)
    assert lease and lease.question_id == "q0" and place.queue.lease("anna", 60) is None


def test_a_lease_that_ran_out_is_free_and_its_holder_may_answer_while_nobody_took_it(place: Place):
    place.ask(1)
    place.queue.lease("anna", 60)
    place.clock.now += 61
    place.queue.answer("anna", "q0", Choice.LEFT)  # late, but the place is still hers
    place.queue.undo("anna", 60)
    place.clock.now += 61
    assert place.say("ben") == "q0"
    with pytest.raises(Gone, match="others have answered"):
        place.queue.answer("anna", "q0", Choice.LEFT)
    assert place.queue.lease("anna") is None
    assert sql(place.url, "select expert, vote from expert_ticket order by expert") == [("anna", None), ("ben", "tie")]


def test_an_answer_counts_once_and_is_changed_by_undo_alone(place: Place):
    place.ask(2)
    assert place.say("anna", "good") == "q0"
    place.queue.lease("anna")
    lease = place.queue.undo("anna")
    assert lease.said is not None and lease.said.choice is choice_of(lease, "good")
    again = replace(lease, said=None)
    assert lease.question_id == "q0" and place.queue.lease("anna") == again  # first what was taken back
    place.queue.answer("anna", "q0", Choice.LEFT, note="so")
    place.queue.answer("anna", "q0", Choice.LEFT, note="so")  # sent twice
    for other in ({"choice": Choice.RIGHT, "note": "so"}, {"choice": Choice.LEFT, "note": "changed"}):
        with pytest.raises(Answered, match="undo first"):
            place.queue.answer("anna", "q0", **other)
    assert place.queue.progress("anna")["answered"] == 1
    with pytest.raises(NoTicket):
        place.queue.answer("ben", "q0", Choice.LEFT)
    with pytest.raises(NoTicket):
        place.queue.answer("anna", "nothing", Choice.LEFT)
    with pytest.raises(NoTicket):
        place.queue.undo("ben")


def test_undo_reaches_back_until_the_question_is_settled(place: Place):
    ids = place.ask(1)
    place.say("anna", "good")
    place.queue.settle(ids, undo_s=30)
    assert place.ledger.answers(ids) == {}
    place.queue.undo("anna")
    place.clock.now += 31
    place.queue.settle(ids, undo_s=30)
    assert place.ledger.answers(ids) == {}  # there is no answer now, however long ago the first one was
    place.say("anna", "bad 0")
    place.clock.now += 30
    place.queue.settle(ids, undo_s=30)
    assert place.ledger.answers(ids)["q0"].answer["verdict"] == "B"
    with pytest.raises(Gone, match="final"):
        place.queue.undo("anna")


def test_a_skip_is_taken_back_only_while_nobody_has_its_place(place: Place):
    place.ask(2)
    place.say("anna", "good")
    place.say("anna", Choice.SKIP)
    assert place.queue.undo("anna").question_id == "q1"
    place.say("anna", Choice.SKIP)
    lease = place.queue.lease("ben", 60)
    assert lease and lease.question_id == "q1"
    assert place.queue.undo("anna").question_id == "q0"  # the last one that is still hers
    with pytest.raises(Gone, match="another expert has it"):
        place.queue.undo("anna")
    assert place.queue.lease("ben", 60).question_id == "q1"
    place.queue.answer("ben", "q1", Choice.LEFT)
    assert place.queue.progress()["leased"] == 1  # q0, anna's


def test_an_undo_passes_over_what_is_settled(place: Place):
    ids = place.ask(2, overlap=1)
    place.say("anna", "good")
    place.say("anna", Choice.SKIP)
    assert place.say("ben") == "q1"
    place.queue.settle(["q1"], undo_s=0)
    assert place.queue.undo("anna").question_id == "q0"
    place.say("anna", "good")
    place.queue.settle(ids, undo_s=0)
    with pytest.raises(Gone, match="final"):
        place.queue.undo("anna")


def test_a_release_leaves_the_leases_in_other_runs(place: Place):
    place.ask(1)
    place.ask(1, run="other", start=5)
    other = ExpertQueue(place.ledger.database, ["other"], place.clock)
    assert place.queue.lease("anna") and other.lease("anna")
    assert place.queue.release("anna", "q5") == 0 and place.queue.release("anna") == 1
    assert other.progress()["leased"] == 1 and place.queue.progress()["leased"] == 0
    assert other.release("anna") == 1


def test_a_skip_leaves_the_question_to_others(place: Place):
    place.ask(1, overlap=2)
    assert place.say("anna", Choice.SKIP) == "q0" and place.queue.lease("anna") is None
    assert place.say("ben") == "q0" and place.say("cleo") == "q0"
    counts = place.queue.progress("anna")
    assert (counts["given"], counts["answered"], counts["skipped"], counts["left"]) == (2, 0, 1, 0)


def test_questions_that_others_answered_come_first_then_those_opened_first(place: Place):
    place.ask(3, overlap=2)
    place.clock.now += 1
    place.ask(1, overlap=2, start=7)
    first = place.queue.lease("anna")
    place.queue.release("anna")
    assert first and first.question_id == "q0"
    assert [place.say("anna") for _ in range(4)] == ["q0", "q1", "q2", "q7"]
    place.queue.undo("anna")
    place.queue.release("anna")
    assert place.say("ben") == "q0"
    assert place.say("anna") == "q7"


def test_which_open_questions_wait_for_whom(place: Place):
    place.ask(3, overlap=2)
    assert [(w.question_id, w.lacking, w.may) for w in place.queue.waiting()] == [(f"q{i}", 2, ()) for i in range(3)]
    place.say("anna")
    place.say("anna", Choice.SKIP)
    assert place.say("ben") == "q0"  # complete, and can still be taken back
    one, two = place.queue.waiting()
    assert (one.question_id, one.lacking, one.answered, one.skipped, one.may) == ("q1", 2, (), ("anna",), ("ben",))
    assert (two.question_id, two.may) == ("q2", ("anna", "ben"))
    assert place.queue.lease("cleo", 60) and place.queue.waiting()[0].may == ("ben", "cleo")
    place.clock.now += 61
    assert place.queue.waiting()[0].may == ("ben",)  # who let a lease run out and answered nothing has left


def test_time_that_is_over_keeps_what_is_decided_and_fails_the_rest(place: Place):
    ids = place.ask(4, overlap=3)
    for expert, choices in (("anna", ["good", "good", Choice.HARMFUL]), ("ben", ["good", "bad 1"])):
        for choice in choices:
            place.say(expert, choice)
    assert place.queue.withdraw(ids, "unanswered: late", price=2.0) == 2
    answers = place.ledger.answers(ids)
    assert [answers[i].ok for i in ids] == [True, False, True, False]
    assert answers["q0"].answer["verdict"] == "A" and answers["q0"].cost == 4.0
    assert answers["q2"].answer["verdict"] == "invalid" and answers["q1"].error == "unanswered: late"
    assert place.queue.lease("cleo") is None

    place.ask(4, overlap=3, run="later")  # a later run buys the failures again; what was said of them counts
    later = ExpertQueue(place.ledger.database, ["later"], place.clock)
    assert set(later.still_open(ids)) == {"q1", "q3"}
    assert later.progress()["given"] == 5 and later.lease("ben").question_id == "q3"


def test_another_runs_questions_are_not_shown(place: Place):
    place.ask(1, run="other")
    assert place.queue.lease("anna") is None and place.queue.progress("anna")["questions"] == 0
    assert ExpertQueue(place.ledger.database, clock=place.clock).lease("anna") is not None


def test_what_is_dropped_is_shown_no_more_unless_something_else_asked_it(place: Place):
    place.ask(4)
    place.say("anna")
    place.ledger.reserve("other", "round-1", questions(2, 3), None)
    assert place.queue.drop("run", "round-2", []) == 0
    assert place.queue.drop("run", "round-1", ["q1"]) == 2  # q0 and q3: q1 is kept, q2 the other run's too
    assert set(place.queue.still_open([f"q{i}" for i in range(4)])) == {"q1", "q2"}
    place.queue.open(questions(0, 1), 2)
    assert place.queue.progress(question_ids=["q0"])["given"] == 1  # it kept its answer
    assert place.queue.lease("anna").question_id != "q0"


def test_agreement_is_on_settled_questions_that_others_answered(place: Place):
    ids = place.ask(4, overlap=2)
    for expert, choices in (("anna", ["good", "good", "bad 2", Choice.SKIP]), ("ben", ["good", "bad 1", "bad 2"])):
        for choice in choices:
            place.say(expert, choice)
    assert place.queue.agreement("anna")["compared"] == 0  # open: she could still change her mind
    place.queue.settle(ids, undo_s=0)
    found = place.queue.agreement("anna")
    assert (found["compared"], found["agree"]) == (3, pytest.approx(2 / 3)) and found == place.queue.agreement("ben")
    assert place.queue.agreement("anna", last=1) == {"compared": 1, "agree": 1.0, "kappa": None}
    assert place.queue.experts() == ["anna", "ben"]


def test_a_ledger_from_before_there_were_experts_gets_what_they_need(place: Place):
    place.ask(1)
    for thing in ("table expert_ticket", "table expert_item", "index charge_by_question"):
        sql(place.url, f"drop {thing}")
    again = Place(place.url)
    again.queue.open(questions(0, 1), 1)
    assert again.say("anna") == "q0"
    with pytest.raises(Exception, match="charge_by_question"):
        sql(place.url, "create index charge_by_question on charge (at)")
    again.ledger.close()


EXPERT = """
import sys, time
from psyray.active.ledger import Ledger
from psyray.active.queue import ExpertQueue
from psyray.active.votes import Choice
url, name, wanted = sys.argv[1], sys.argv[2], int(sys.argv[3])
queue = ExpertQueue(Ledger(url).database)
while queue.progress()["given"] < wanted:
    if lease := queue.lease(name, 1.0):
        queue.answer(name, lease.question_id, Choice.LEFT if lease.left == "good" else Choice.RIGHT)
        print(lease.question_id, flush=True)
    else:
        time.sleep(0.05)
"""


def test_eight_experts_at_once_of_whom_two_are_killed(tmp_path: Path):
    place = Place(fresh_url(tmp_path))
    ids = place.ask(24, overlap=3)

    def start(name: str, wanted: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", EXPERT, place.url, name, str(wanted)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed = {name: start(name, 10**9) for name in ("killed-0", "killed-1")}  # they would go on for ever
    told = [(process.stdout.readline().strip(), name) for name, process in killed.items()]
    others = {name: start(name, 72) for name in (f"expert-{i}" for i in range(6))}
    for name, process in killed.items():
        os.kill(process.pid, signal.SIGKILL)
        told += [(line, name) for line in process.stdout.read().split()]  # `communicate` would miss what is buffered
        process.wait(timeout=60)
    for name, process in others.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        told += [(line, name) for line in out.split()]
    kept = sql(place.url, "select question_id, expert from expert_ticket where vote is not null")
    assert len(kept) == len(set(kept)) == 72 and set(told) <= set(kept)
    assert len(kept) - len(told) <= 2  # what a killed one had written down and not said yet
    assert set(Counter(question for question, _ in kept).values()) == {3}
    ExpertQueue(place.ledger.database).settle(ids, undo_s=0)
    answers = place.ledger.answers(ids)
    assert len(answers) == 24 and all(a.answer["verdict"] == "A" for a in answers.values())
    place.ledger.close()
