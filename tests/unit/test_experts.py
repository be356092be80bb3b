"""A round that waits for experts, a labelled set that answers, and verdicts that are flipped: without Ray."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from psyray import plan
from psyray.active import experts as experts_module
from psyray.active import oracles
from psyray.active.experts import Experts
from psyray.active.labelled_set import UNKNOWN, LabelledPairs, labelled_source
from psyray.active.ledger import Answer, Ledger
from psyray.active.noise import Noisy
from psyray.active.oracle_kinds import ORACLES, JudgeOracle, make_oracle
from psyray.active.oracles import buy, exchanged, pair_question, turned
from psyray.active.queue import ExpertQueue, Gone
from psyray.active.votes import Choice, Vote, among
from psyray.active.waiting import Wait
from psyray.config import Config, load_config
from psyray.data.judge import Desk
from psyray.errors import PsyrayError
from psyray.records import PAIRS, Verdict, content_id, pair_row, speech_id, table
from psyray.rubric import load_rubric
from psyray.run import Folder, write_parquet
from psyray.sections.data import JudgeSection
from psyray.sections.learning import OracleSection
from psyray.status import labels_note

RUBRIC = load_rubric("counselling")
SPEECH = [{"role": "user", "content": "I cannot sleep since my father died."}]
WHY = {"value": 0.5}
Pick = Callable[[str, str], Choice]  # what a made-up expert says to the left and the right text


class Named:
    """A judge that is never asked."""

    id = "named"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    ledger = Ledger(f"sqlite:///{tmp_path}/labels.db")
    return Desk(Named(), RUBRIC, ledger, "run", JudgeSection())  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "stage").mkdir()
    return Folder(tmp_path / "stage")


def pairs(count: int) -> list[tuple[dict, dict, dict]]:
    """(good, bad) and (bad, good) by turns."""
    made = []
    for i in range(count):
        good, bad = ({"messages": SPEECH, "text": f"{word} {i}"} for word in ("good", "bad"))
        made.append((good, bad, WHY) if i % 2 else (bad, good, WHY))
    return made


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


def people(desk: Desk, said: list[str] | None = None, **settings) -> Experts:
    section = OracleSection(kind="experts", **{"undo_s": 0, **settings})
    return Experts(desk, section, (said if said is not None else []).append, poll_s=0.01)


def ask(oracle, folder: Folder, count: int, budget: int = 100):
    return oracle.label(folder, pairs(count), purpose="round-1", strategy="drts", budget=budget)


def verdicts(labels) -> list[Verdict | None]:
    return [label and label[0] for label in labels]


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


def rows_of(*chosen: tuple[str, str]) -> list[dict]:
    speech = {"speech_id": speech_id(SPEECH), "messages": SPEECH, "split": "train"}
    made = [[{"response_id": content_id(t), "text": t, "model": "m"} for t in pair] for pair in chosen]
    return [pair_row(speech, *pair, margin=0.5, source="judge") for pair in made]


def published(folder: Path, *chosen: tuple[str, str]) -> Path:
    lines = [{"ID": "x", "question": SPEECH[0]["content"], "chosen": a, "rejected": b} for a, b in chosen]
    path = folder / "set.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def own(folder: Path, *chosen: tuple[str, str]) -> Path:
    write_parquet(folder / "pairs.parquet", table(rows_of(*chosen), PAIRS))
    return folder / "pairs.parquet"


def labelled(desk: Desk, path: Path) -> LabelledPairs:
    return LabelledPairs(desk, labelled_source(OracleSection(kind="replay", path=str(path))), "regex")


@pytest.mark.parametrize("write", [published, own])
def test_a_labelled_set_answers_what_it_knows(desk, folder, tmp_path, write):
    oracle = labelled(desk, write(tmp_path, ("good 0", "bad 0"), ("bad  1", "good 1"), ("good 3", "bad 3")))
    labels, counts = ask(oracle, folder, 4)
    assert verdicts(labels) == [Verdict.B, Verdict.B, Verdict.INVALID, Verdict.A]
    assert labels[2][2] == {"error": UNKNOWN} and labels[0][1] == -1.0
    assert (counts["bought"], counts["answered"], counts["unknown"]) == (4, 3, 1)
    assert oracle.id == f"replay-{oracle.content}" and ask(oracle, folder, 4)[0] == labels


def test_a_pair_that_the_set_holds_both_ways_goes_to_the_majority_or_is_a_tie(desk, folder, tmp_path):
    both = [("good 0", "bad 0"), ("bad 0", "good 0")]
    path = published(tmp_path, *both, ("good 1", "bad 1"), ("good 1", "bad 1"), ("bad 1", "good 1"))
    labels, _ = ask(labelled(desk, path), folder, 2)
    assert verdicts(labels) == [Verdict.TIE, Verdict.A] and labels[1][1] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.jsonl", None, r"no labelled set at .*none\.jsonl \(oracle\.path\)"),
        ("speeches.jsonl", '{"question": "x"}', r"\(oracle\.path\) has no column chosen, rejected; it has question"),
    ],
)
def test_a_set_that_cannot_be_replayed_is_named(tmp_path, name, text, said):
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(PsyrayError, match=said):
        labelled_source(OracleSection(kind="replay", path=str(tmp_path / name)))


class Rates:
    """An oracle that rates the good text higher, with a panel's answers beside."""

    id, identity = "rates", {"rates": 1}

    def label(self, folder, asked, *, purpose, strategy, budget):
        labels = []
        for a, _, _ in asked:
            high, low = {"safety": 3.0}, {"safety": 2.0}
            said = {"a": high, "b": low} if a["text"].startswith("good") else {"a": low, "b": high}
            verdict, margin = (Verdict.A, 1.0) if said["a"] is high else (Verdict.B, -1.0)
            judges = [said | {"verdict": verdict, "margin": margin}, None, {"error": "gone"}]
            labels.append((verdict, margin, said | {"judges": judges}))
        return labels, {}


def test_noise_turns_the_whole_answer_round_and_without_any_is_the_oracle_itself(desk, folder):
    clean, _ = ask(Rates(), folder, 40)
    unmoved, counts = ask(Noisy(desk, Rates(), 0, 7), folder, 40)
    assert counts["flipped"] == 0
    for (verdict, margin, said), same in zip(clean, unmoved, strict=True):
        assert same == (verdict, margin, said | {"verdict": verdict, "margin": margin, "flipped": False})
    flipped, counts = ask(Noisy(desk, Rates(), 1, 7), folder, 40)
    assert counts["flipped"] == 40
    for (verdict, margin, said), (other, against, told) in zip(clean, flipped, strict=True):
        assert (other, against) == (verdict.swap(), -margin) and (told["a"], told["b"]) == (said["b"], said["a"])
        assert told["judges"][0]["verdict"] == other and told["judges"][0]["a"] == told["a"]
        better = "a" if other is Verdict.A else "b"
        assert told[better] == {"safety": 3.0}  # what it says fits its verdict, also for a veto


def test_why_a_pair_is_asked_is_kept_by_side_and_is_no_part_of_the_question():
    (a, b, _), *_ = pairs(1)
    why = {"value": 0.5, "a_mean": 1.0, "a_spread": 0.1, "b_mean": 2.0, "b_spread": 0.2}
    question, flipped = pair_question("x", "r", None, (a, b), "drts", why)
    other, _ = pair_question("x", "r", None, (b, a), "drts", {"value": 9.0})
    assert question.question_id == other.question_id
    side = "a" if question.payload["a"] == a["text"] else "b"
    assert (side == "b") == flipped and question.strategy == "drts"
    assert (question.scores[f"{side}_mean"], question.scores[f"{side}_spread"]) == (1.0, 0.1)
    assert question.scores["value"] == 0.5 and len(question.scores) == 5
    assert turned(turned(why)) == why


class Fixed:
    """An oracle that always prefers the good text and says tie on the last pair."""

    id, identity = "fixed", {"fixed": 1}

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def label(self, folder, asked, *, purpose, strategy, budget):
        questions = [pair_question("fixed", "r", None, (a, b), strategy, {}) for a, b, _ in asked]

        def answer(due):
            for question in due:
                last = question.payload["a"].endswith(f" {len(asked) - 1}")
                verdict = Verdict.TIE if last else Verdict.A if question.payload["a"].startswith("good") else Verdict.B
                said = {"verdict": verdict, "margin": {"A": 1.0, "B": -1.0}.get(verdict, 0.0)}
                self.desk.ledger.answer([Answer(question.question_id, True, said, cost=1.0, who="fixed")])

        return buy(self.desk, questions, answer, purpose=purpose, budget=budget)


def test_noise_flips_the_share_it_says_and_the_ledger_knows_both(desk, folder):
    clean, _ = ask(Fixed(desk), folder, 401, budget=400)
    noisy, counts = ask(Noisy(desk, Fixed(desk), 0.2, 7), folder, 401, budget=400)
    flipped = [i for i in range(400) if noisy[i][0] is not clean[i][0]]
    assert counts["flipped"] == len(flipped) and 55 <= len(flipped) <= 105  # 80, sd 8
    assert all((noisy[i][0], noisy[i][1]) == (clean[i][0].swap(), -clean[i][1]) for i in flipped)
    assert noisy[400] is None and counts["refused"] == 1
    summary = {row["purpose"]: row for row in desk.ledger.summary("run")}
    assert summary["round-1"]["bought"] == 400 and summary["round-1"]["cost"] == 400.0
    assert summary["round-1/noisy"]["answered"] == 400 and summary["round-1/noisy"]["cost"] == 0.0
    question, _ = Noisy(desk, Fixed(desk), 0.2, 7)._question(pairs(1)[0], "drts")
    assert desk.ledger.answers([question.question_id])[question.question_id].who == "noisy 0.2 seed 7 of fixed"
    again, _ = ask(Noisy(desk, Fixed(desk), 0.2, 7), folder, 401, budget=400)
    assert again == noisy
    more, _ = ask(Noisy(desk, Fixed(desk), 0.4, 7), folder, 401, budget=400)
    assert all(more[i][0] is not clean[i][0] for i in flipped)  # what errs at a lower rate errs at a higher one
    other, _ = ask(Noisy(desk, Fixed(desk), 0.2, 8), folder, 401, budget=400)
    assert other != noisy


def test_a_tie_stays_a_tie_whatever_the_noise(desk, folder):
    labels, counts = ask(Noisy(desk, Fixed(desk), 1.0, 0), folder, 3)
    assert verdicts(labels) == [Verdict.A, Verdict.B, Verdict.TIE] and counts["flipped"] == 2


def test_every_kind_in_the_configuration_is_in_the_dict_and_the_judges_stages_are_what_they_were(desk):
    assert set(get_args(OracleSection.model_fields["kind"].annotation)) == set(ORACLES)
    judge = make_oracle(Config(), desk, print)
    assert isinstance(judge, JudgeOracle) and judge.identity == desk.labels_identity
    noisy = make_oracle(load_config(None, ["oracle.kind=noisy", "oracle.of=experts"]), desk, print)
    assert noisy.id == "noisy 0.1 seed 0 of experts"
    assert people(desk, wait_s=5).identity == people(desk, wait_s=9).identity  # how long is no part of the result
    assert people(desk, fall_back="judge").identity != people(desk).identity
    assert replace(people(desk)).identity["experts"]["overlap"] == 1


def test_replay_without_a_set_is_refused():
    for words in (["oracle.kind=replay"], ["oracle.kind=noisy", "oracle.of=replay"]):
        with pytest.raises(PsyrayError, match=r"oracle: replay needs oracle\.path"):
            load_config(None, words)


def test_the_plan_says_who_answers():
    words = ["oracle.kind=noisy", "oracle.of=experts", "oracle.overlap=3", "oracle.flip=0.25"]
    assert plan.answering(load_config(None, words).oracle) == "3 experts each, 25% of the verdicts flipped"
    assert "comparisons by 2 experts each; rubric" in plan.labels(
        load_config(None, ["oracle.kind=experts", "oracle.overlap=2"])
    )
    assert "comparisons; rubric" in plan.labels(Config())
    panel = "panel.judges=[{engine: rule}, {engine: vllm, model: m, budget: 0}]"
    for words, said in (([], "all"), (["judge.budget=7"], "at most 7"), ([panel], "all or at most 0"),
                        ([panel, "judge.budget=7"], "at most 7 or at most 0")):  # fmt: skip
        assert plan.labels(load_config(None, words)).startswith(f"{said} responses rated first")
