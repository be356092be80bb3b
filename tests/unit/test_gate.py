"""The gate: what it compares, which speeches decide, and why a policy may not go on."""

import math
from dataclasses import replace

import pytest

from psyray.data.judge import Desk
from psyray.engines.judges import RuleJudge
from psyray.errors import PsyrayError
from psyray.evaluate.duels import Duel, by_scores, by_speech, check_invalid, grade, side_by_side, verdict_rows
from psyray.evaluate.gate import by_part, failures, reward_opinion, second_grade
from psyray.records import Verdict, in_share, speech_id
from psyray.rubric import load_rubric
from psyray.run import Folder
from psyray.sections.data import JudgeSection
from psyray.sections.learning import EvaluateSection

START = {"repeated_share": 0.02, "truncated_share": 0.5}
GOOD = {"win_rate": 0.7, "low": 0.6, "high": 0.8, "length_change": 0.1, "repeated_share": 0.05}
GOOD |= {"truncated_share": 0.6}
GOOD |= {"wins": 6, "ties": 2, "losses": 2}
KEPT = {"perplexity_rise": 0.1, "capability_drop": 0.05, "kl": 0.4}


def answer(key: str, speech: str, text: str = "words") -> dict:
    return {"response_id": key, "speech_id": speech, "text": text, "status": "ok"}


def silent(key: str, speech: str) -> dict:
    return answer(key, speech) | {"text": None, "status": "invalid"}


def made_desk(section: JudgeSection) -> Desk:
    rubric = load_rubric("counselling")
    return Desk(RuleJudge(rubric), rubric, None, "run", section)  # type: ignore[arg-type]


def judged(**scores: float | None) -> list[dict]:
    return [{"response_id": k, "score": v, "status": "ok" if v else "invalid"} for k, v in scores.items()]


def test_answers_meet_by_speech_and_an_unrated_one_is_invalid_not_lost():
    new = [answer("n1", "s1"), answer("n2", "s2"), answer("n3", "s3")]
    old = [answer("o3", "s3"), answer("o1", "s1"), answer("o2", "s2")]
    rated = judged(n1=4.0, n2=2.0, n3=None, o1=3.0, o2=3.0, o3=3.0)
    duels = by_speech(new, old)
    compared = by_scores(duels, rated, tie_margin=0.0)
    assert [(c.speech_id, c.a_id, c.b_id) for c in compared] == [
        ("s1", "n1", "o1"),
        ("s2", "n2", "o2"),
        ("s3", "n3", "o3"),
    ]
    found = grade(duels, [c.verdict for c in compared])
    assert (found["wins"], found["losses"], found["ties"], found["invalid"]) == (1, 1, 0, 1)
    assert found["win_rate"] == 0.5
    assert found["length_controlled_low"] <= found["length_controlled"] <= found["length_controlled_high"]


def test_an_empty_answer_loses_whoever_judges_and_a_failed_one_is_invalid(tmp_path):
    failed = silent("n3", "s3") | {"status": "failed"}
    new = [silent("n1", "s1"), answer("n2", "s2"), failed, silent("n4", "s4")]
    old = [answer("o1", "s1"), silent("o2", "s2"), answer("o3", "s3"), silent("o4", "s4")]
    duels = by_speech(new, old)
    rated = by_scores(duels, judged(o1=3.0, n2=3.0, o3=3.0), tie_margin=0.0)
    shown = side_by_side(Folder(tmp_path), made_desk(JudgeSection()), duels, purpose="duels-1")
    for compared in (rated, shown):
        assert [c.verdict for c in compared] == [Verdict.B, Verdict.A, Verdict.INVALID, Verdict.INVALID]
        found = grade(duels, [c.verdict for c in compared])
        assert (found["wins"], found["losses"], found["invalid"], found["win_rate"]) == (1, 1, 2, 0.5)


def test_the_reward_model_has_an_opinion_by_id():
    duels = [Duel(answer("n1", "s1"), answer("o1", "s1")), Duel(answer("n2", "s2"), answer("o2", "s2"))]
    scores = [{"response_id": k, "mean": v} for k, v in {"n1": 1.0, "o1": 0.0, "n2": 0.0, "o2": 1.0}.items()]
    assert reward_opinion(duels, scores) == {"reward_win_rate": 0.5}
    assert reward_opinion(duels, scores[:2]) == {"reward_win_rate": 1.0}
    assert reward_opinion(duels, []) == {}
    alike = [{"response_id": k, "mean": 2.0} for k in ("n1", "o1", "n2", "o2")]
    assert reward_opinion(duels, alike) == {"reward_win_rate": 0.5}


def test_a_second_judges_verdicts_are_joined_by_speech():
    duels = [Duel(answer(f"n{i}", f"s{i}"), answer(f"o{i}", f"s{i}")) for i in range(4)]
    rows = [{"speech_id": f"s{i}", "verdict": v} for i, v in enumerate(("A", "A", "B", "tie"))]
    assert second_grade(duels, rows[::-1])["win_rate"] == pytest.approx(0.625)
    assert second_grade(duels[:2], rows)["win_rate"] == 1.0 and "unasked" not in second_grade(duels[:2], rows)


def test_what_a_second_judges_budget_did_not_reach_is_counted_and_no_loss():
    duels = [Duel(answer(f"n{i}", f"s{i}"), answer(f"o{i}", f"s{i}")) for i in range(4)]
    found = second_grade(duels, [{"speech_id": "s2", "verdict": "A"}])
    assert (found["win_rate"], found["wins"], found["invalid"], found["unasked"]) == (1.0, 1, 0, 3)
    with pytest.raises(PsyrayError, match=r"evaluate\.second\.budget reached none of 4"):
        second_grade(duels, [])


def test_without_a_usable_verdict_there_is_no_win_rate():
    with pytest.raises(PsyrayError, match="nothing to compare"):
        grade([Duel(answer("n", "s"), answer("o", "s"))], [Verdict.INVALID])


def test_too_many_unusable_verdicts_stop_the_stage():
    desk = made_desk(JudgeSection(max_invalid_share=0.25))
    good = [(Verdict.A, 1.0, {})] * 3
    gone = (Verdict.INVALID, 0.0, {"error": "gone"})
    check_invalid([*good, gone], desk, "duels-1")
    said = r"duels-1: 2 of 5 pairs .*, more than evaluate\.second\.max_invalid_share \(25%\); most often: gone"
    with pytest.raises(PsyrayError, match=said):
        check_invalid([*good, gone, gone], replace(desk, setting="evaluate.second"), "duels-1")
    duels = [Duel(answer("n", "s"), answer("o", "s"))]
    [row] = verdict_rows(by_scores(duels, judged(n=2.0, o=1.5), 0.0), desk)
    assert row == {
        "speech_id": "s", "policy_id": "n", "start_id": "o", "judge": desk.judge.id, "verdict": "A", "margin": 0.5,
    }  # fmt: skip


def test_a_good_policy_passes_and_each_fault_is_named():
    section = EvaluateSection()
    assert failures(GOOD, START, section) == []
    assert "not surely above 0.50" in failures(GOOD | {"low": 0.5}, START, section)[0]
    assert failures(GOOD | {"low": 0.0}, START, section.model_copy(update={"min_win_rate": 0.0})) == []
    assert "mean length changed by -25%" in failures(GOOD | {"length_change": -0.25}, START, section)[0]
    assert "looping replies rose by 8%" in failures(GOOD | {"repeated_share": 0.10}, START, section)[0]
    [reason] = failures(GOOD | {"truncated_share": 0.7}, START, section)
    assert reason == "replies cut off at their limit rose by 20%, allowed are 15%"
    assert failures(GOOD | {"truncated_share": 0.7}, START, EvaluateSection(max_truncated_rise=0.25)) == []
    assert failures(GOOD | {"truncated_share": 0.0}, START, section) == []
    assert len(failures(GOOD | {"low": 0.1, "length_change": 1.0, "repeated_share": 1.0}, START, section)) == 3


def test_a_few_wins_are_no_proof_however_narrow_the_interval():
    few = GOOD | {"win_rate": 1.0, "low": 1.0, "high": 1.0, "wins": 5, "ties": 0, "losses": 0}
    [reason] = failures(few, START, EvaluateSection())
    assert reason == "win rate 1.00 rests on 5 speeches; 6 are the least"
    assert failures(few | {"wins": 6}, START, EvaluateSection()) == []
    assert failures(few, START, EvaluateSection(min_win_rate=0.0)) == []


def test_what_the_probe_found_lost_is_named_and_no_number_is_no_pass():
    section = EvaluateSection()
    assert failures(GOOD | {"probe": KEPT}, START, section) == []
    for key, value, words in (
        ("perplexity_rise", 0.3, "perplexity on general text rose by 30%, allowed: 25%"),
        ("perplexity_rise", math.nan, "perplexity"),
        ("capability_drop", 0.2, "20% fewer questions were answered right"),
    ):
        [reason] = failures(GOOD | {"probe": KEPT | {key: value}}, START, section)
        assert words in reason
    [reason] = failures(GOOD | {"probe": KEPT}, START, EvaluateSection(max_kl=0.3))
    assert "0.40 nats a token" in reason
    assert failures(GOOD | {"probe": KEPT}, START, EvaluateSection(max_kl=0.5)) == []


def test_a_second_judge_decides_only_where_it_is_told_to():
    doubtful = GOOD | {"second": {"win_rate": 0.52, "low": 0.45, "high": 0.6, "wins": 9, "ties": 3, "losses": 8}}
    other = JudgeSection(engine="vllm", model="m")
    assert failures(doubtful, START, EvaluateSection(second=other)) == []
    [reason] = failures(doubtful, START, EvaluateSection(second=other, second_decides=True))
    assert "the second judge's win rate 0.52 is not surely above 0.50" in reason


def test_a_share_of_the_speeches_decides_and_the_others_only_report():
    talks = [[{"role": "user", "content": f"{i}"}] for i in range(200)]
    talks += [[*talk, {"role": "assistant", "content": "Yes?"}, *talk] for talk in talks]
    answers = [{"speech_id": speech_id(talk), "messages": talk} for talk in talks]

    def measure(keep) -> dict:
        return {"speeches": [a["speech_id"] for a in answers if keep(a["speech_id"])]}

    ids = [a["speech_id"] for a in answers]
    assert by_part(measure, answers, 0.0, 1) == {"speeches": ids}
    parts = by_part(measure, answers, 0.3, 1)
    dev, test = parts["speeches"], parts["test"]["speeches"]
    assert set(dev) | set(test) == set(ids) and not set(dev) & set(test)
    assert 0.22 < len(dev) / 400 < 0.38 and set(dev) < set(by_part(measure, answers, 0.6, 1)["speeches"])
    alone = [key for key in ids[:200] if in_share(0.3, "dev", key)]  # a conversation's other length is with it
    assert dev == alone + [longer for key, longer in zip(ids[:200], ids[200:], strict=True) if key in alone]
    with pytest.raises(PsyrayError, match=r"evaluate.dev_share 0\.3"):
        by_part(measure, [a for a in answers if a["speech_id"] in set(test)], 0.3, 1)
