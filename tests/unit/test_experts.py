"""A round that waits for experts, without Ray."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from made_oracles import ask, pairs, people, verdicts

from psyray.active import experts as experts_module
from psyray.active import oracles
from psyray.active.leases import Gone
from psyray.active.oracles import exchanged
from psyray.active.queue import ExpertQueue
from psyray.active.votes import Choice, Vote, among
from psyray.active.waiting import Wait
from psyray.data.judge import Desk
from psyray.errors import PsyrayError
from psyray.in_words import labels_note
from psyray.records import Verdict
from psyray.run import Folder

Pick = Callable[[str, str], Choice]  # what a made-up expert says to the left and the right text


def prefers_good(left: str, right: str) -> Choice:
    return Choice.LEFT if left.startswith("good") else Choice.RIGHT


class Crowd:
    """Made-up experts who answer in a thread of their own, as over the server."""

    def __init__(self, desk: Desk, answers: int, **picks: Pick) -> None:
        self.queue, self.picks, self.left = ExpertQueue(desk.ledger.database), picks, answers
        self.thread = threading.Thread(target=self.work, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()

    def work(self) -> None:
        until = time.monotonic() + 20
        while self.left and time.monotonic() < until:
            for name, pick in self.picks.items():
                if self.left and (lease := self.queue.lease(name)):
                    self.queue.answer(name, lease.question_id, pick(lease.left, lease.right))
                    self.left -= 1
            time.sleep(0.005)


GOOD = [Verdict.B, Verdict.A, Verdict.B, Verdict.A]  # of `pairs`


def test_a_round_goes_on_by_itself_when_the_labels_are_in(desk, folder):
    said: list[str] = []
    with Crowd(desk, 8, anna=prefers_good, ben=prefers_good):
        labels, counts = ask(people(desk, said, overlap=2, price=2.0), folder, 5, budget=4)
    assert verdicts(labels) == [*GOOD, None] and labels[0][1] == -1.0
    agreed = {"people": 2, "compared": 4, "agree": 1.0, "alpha": 1.0}
    asked = {"asked": 4, "bought": 4, "reused": 0, "answered": 4, "refused": 1, "unanswered": 0}
    asked["bought_before"] = 0
    assert counts == asked | {"experts": agreed}
    assert "2 experts agree 100.0 % (alpha 1.00)" in labels_note(counts)
    assert "4 questions wait for 2 experts" in said[0] and "serve run serve.annotate:build run=run" in said[0]
    [spent] = desk.ledger.summary("run")
    assert spent["cost"] == 16.0
    progress = json.loads((folder.path / "progress.json").read_text())
    assert (progress["done"], progress["total"], progress["unit"]) == (8, 8, "answers")


def test_a_pair_that_came_up_the_other_way_round_is_one_question_with_its_votes_turned(desk, folder):
    with Crowd(desk, 1, anna=prefers_good):
        forward, _ = ask(people(desk), folder, 1)
    (bad, good, value), *_ = pairs(1)
    oracle = people(desk)
    backward, counts = oracle.label(folder, [(good, bad, value)], purpose="round-1", strategy="drts", budget=1)
    assert counts["bought"] == 1 and (forward[0][0], backward[0][0]) == (Verdict.B, Verdict.A)
    one, other = forward[0][2], backward[0][2]
    assert exchanged(one) == other and exchanged(other) == one
    assert one["experts"][0]["vote"] == "B" and other["experts"][0]["vote"] == "A"


def test_ctrl_c_while_it_waits_loses_nothing_and_pays_nothing_twice(desk, folder, monkeypatch):
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(experts_module.time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(people(desk), folder, 4)
    with Crowd(desk, 2, anna=prefers_good):  # people go on meanwhile
        pass
    with Crowd(desk, 2, anna=prefers_good):
        labels, counts = ask(people(desk), folder, 4)
    assert verdicts(labels) == GOOD and counts["bought"] == 4 and desk.ledger.spent("run") == {"round-1": 4}


def test_what_changed_settings_no_longer_ask_is_taken_from_the_experts_and_counted_apart(desk, folder):
    queue, said = ExpertQueue(desk.ledger.database), list[str]()
    before = people(desk, overlap=1, wait_s=0)  # stops at once
    with pytest.raises(PsyrayError, match="2 of 2 questions have no answer"):
        ask(before, folder, 2)
    old = queue.lease("anna")
    with pytest.raises(PsyrayError, match="2 of 2 questions have no answer"):
        ask(people(desk, said, overlap=2, wait_s=0), folder, 2)  # other questions, by their overlap
    with Crowd(desk, 4, ben=prefers_good, cleo=prefers_good):
        labels, counts = ask(people(desk, overlap=2), folder, 2)
    assert verdicts(labels) == GOOD[:2] and queue.lease("ben") is None
    assert "2 questions of before the settings changed are no longer put to experts" in said[0]
    assert (counts["asked"], counts["bought"], counts["bought_before"]) == (2, 2, 2)
    with pytest.raises(Gone):
        queue.answer("anna", old.question_id, Choice.LEFT)
    queue.release("anna")
    with pytest.raises(PsyrayError):
        ask(before, folder, 2)  # and back again
    with Crowd(desk, 2, ben=prefers_good):
        assert verdicts(ask(people(desk, overlap=1), folder, 2)[0]) == GOOD[:2]


def test_nobody_is_asked_for_settings_that_are_no_more_where_all_answers_are_there(desk, folder):
    with Crowd(desk, 2, ben=prefers_good):
        labels, _ = ask(people(desk), folder, 2)
    with pytest.raises(PsyrayError, match="2 of 2 questions have no answer"):
        ask(people(desk, overlap=2, wait_s=0), folder, 2)
    assert ask(people(desk), folder, 2)[0] == labels  # and back again
    assert ExpertQueue(desk.ledger.database).lease("anna") is None


def test_what_the_judge_was_asked_in_the_experts_place_is_counted(desk, folder, monkeypatch):
    counted = {"asked": 2, "bought": 1, "reused": 1, "answered": 2, "refused": 0}
    monkeypatch.setattr(oracles, "label", lambda *_, **given: ([(Verdict.A, 1.0, {})] * given["budget"], counted))
    labels, counts = ask(people(desk, wait_s=0, fall_back="judge"), folder, 2)
    assert verdicts(labels) == [Verdict.A] * 2 and counts["unanswered"] == 2
    assert counts["by_judge"] == {"asked": 2, "bought": 1, "reused": 1}


def half_answered(desk: Desk, folder: Folder) -> None:
    """Four questions for two experts each, of which two are answered, and time that is over."""
    with pytest.raises(PsyrayError, match=r"4 of 4 questions have no answer by 2 experts after 0\.0 s"):
        ask(people(desk, overlap=2, wait_s=0), folder, 4)
    with Crowd(desk, 4, anna=prefers_good, ben=prefers_good):
        pass


def test_time_that_is_over_stops_the_run_and_the_same_command_goes_on_when_answers_are_in(desk, folder):
    half_answered(desk, folder)
    with pytest.raises(PsyrayError, match=r"2 of 4 .* nothing is lost"):
        ask(people(desk, overlap=2, wait_s=0), folder, 4)
    with Crowd(desk, 4, anna=prefers_good, ben=prefers_good):
        pass
    labels, counts = ask(people(desk, overlap=2, wait_s=0), folder, 4)
    assert verdicts(labels) == GOOD and counts["bought"] == 4


def test_what_nobody_answered_in_time_is_left_out(desk, folder):
    half_answered(desk, folder)
    said: list[str] = []
    labels, counts = ask(people(desk, said, overlap=2, wait_s=0, fall_back="leave_out"), folder, 4)
    assert sorted(verdicts(labels), key=str) == sorted([Verdict.A, Verdict.B, None, None], key=str)
    assert counts["unanswered"] == 2 and "2 of 4 questions go by oracle.fall_back leave_out" in said[-1]
    again, counts = ask(people(desk, overlap=2, wait_s=0, fall_back="leave_out"), folder, 4)
    assert again == labels and counts["unanswered"] == 2 and desk.ledger.spent("run") == {"round-1": 4}


def waits(desk: Desk, folder: Folder, overlap: int, **picks: Pick) -> list[str]:
    """What a round without an end says of a wait for nobody, once `picks` have answered what they may."""
    with pytest.raises(PsyrayError):
        ask(people(desk, overlap=overlap, wait_s=0), folder, 2)  # puts the questions up
    queue = ExpertQueue(desk.ledger.database)
    for name, pick in picks.items():
        while lease := queue.lease(name):
            queue.answer(name, lease.question_id, pick(lease.left, lease.right))
    said, polls = list[str](), iter(range(30))

    def poll(seconds: float) -> None:
        if next(polls, None) is None:
            raise KeyboardInterrupt
        time.sleep(seconds)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(experts_module, "time", SimpleNamespace(sleep=poll, monotonic=time.monotonic))
        ask(replace(people(desk, said, overlap=overlap), look_s=0.05), folder, 2)
    return [line for line in said if "wait for nobody" in line]


def test_a_round_that_waits_for_nobody_says_so_once_and_how_to_mend_it(desk, folder):
    [told] = waits(desk, folder, 1, anna=lambda *_: Choice.SKIP, ben=lambda *_: Choice.SKIP)
    assert "round-1: 2 open questions lack answers; 2 wait for nobody (" in told
    assert "anna, ben had them, and 2 answers are lacking" in told
    assert "Give another expert a key, have anna or ben undo a skip, or stop" in told
    assert "oracle.wait_s and oracle.fall_back" in told


def test_more_answers_wanted_than_people_come_is_a_wait_for_nobody(desk, folder):
    [told] = waits(desk, folder, 3, anna=prefers_good, ben=prefers_good)
    assert "anna, ben had them, and 2 answers are lacking" in told and "undo" not in told


def test_a_round_to_which_nobody_has_come_says_so(desk, folder):
    [told] = waits(desk, folder, 2)
    assert "no expert has answered yet. Give an expert a key, or stop" in told


def test_a_round_whose_questions_somebody_may_answer_says_nothing_of_it(desk, folder):
    queue = ExpertQueue(desk.ledger.database)
    with pytest.raises(PsyrayError):
        ask(people(desk, overlap=1, wait_s=0), folder, 2)
    queue.answer("anna", queue.lease("anna").question_id, Choice.SKIP)
    assert not Wait(queue.waiting()).stuck
    assert re.fullmatch(r"2 open questions lack answers: anna may answer 1; 1 wait .*", Wait(queue.waiting()).told())
    assert waits(desk, folder, 1) == []
    assert not Wait([]).stuck and Wait([]).told() == ""


def test_harm_makes_a_question_invalid(desk, folder):
    with Crowd(desk, 2, anna=prefers_good, ben=lambda left, right: Choice.HARMFUL):
        labels, counts = ask(people(desk, overlap=2), folder, 1)
    assert verdicts(labels) == [Verdict.INVALID] and counts["answered"] == 1


def test_how_far_people_agree_is_over_all_two_votes_on_a_question():
    a, b, tie = Vote.A, Vote.B, Vote.TIE
    found = among([{"anna": a, "ben": a, "carl": b}, {"anna": b, "ben": b}, {"carl": tie}])
    assert (found["people"], found["compared"], found["agree"]) == (3, 4, 0.5)
    # Krippendorff's alpha by hand: 5 pairable votes, observed disagreement 0.4, expected 0.6.
    assert found["alpha"] == pytest.approx(1 - 0.4 / 0.6)
    assert among([{"anna": a}, {"anna": b}]) == {"people": 1, "compared": 0, "agree": None, "alpha": None}
    assert among([{"anna": a, "ben": a}])["alpha"] is None and among([])["people"] == 0
    assert [vote.choice(side).vote(side) for vote in Vote for side in (True, False)] == [v for v in Vote for _ in "LR"]
