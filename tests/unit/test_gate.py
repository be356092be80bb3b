"""The gate: what it compares, and why a policy may not go on."""

from psyray.config import EvaluateSection
from psyray.evaluate.gate import against_start, by_speech, failures, second_opinion

START = {"repeated_share": 0.02}
GOOD = {"win_rate": 0.7, "low": 0.6, "high": 0.8, "length_change": 0.1, "repeated_share": 0.05}


def answer(key: str, speech: str, text: str = "words") -> dict:
    return {"response_id": key, "speech_id": speech, "text": text}


def judged(**scores: float | None) -> list[dict]:
    return [{"response_id": k, "score": v, "status": "ok" if v else "invalid"} for k, v in scores.items()]


def test_answers_meet_by_speech_and_an_unrated_one_is_invalid_not_lost():
    new = [answer("n1", "s1"), answer("n2", "s2"), answer("n3", "s3")]
    old = [answer("o3", "s3"), answer("o1", "s1"), answer("o2", "s2")]
    duels = by_speech(new, judged(n1=4.0, n2=2.0, n3=None), old, judged(o1=3.0, o2=3.0, o3=3.0))
    found = against_start(duels, tie_margin=0.0)
    assert (found["wins"], found["losses"], found["ties"], found["invalid"]) == (1, 1, 0, 1)
    assert found["win_rate"] == 0.5


def test_the_reward_model_gives_a_second_opinion_by_id():
    duels = [(answer("n1", "s1"), answer("o1", "s1")), (answer("n2", "s2"), answer("o2", "s2"))]
    scores = [{"response_id": k, "mean": v} for k, v in {"n1": 1.0, "o1": 0.0, "n2": 0.0, "o2": 1.0}.items()]
    assert second_opinion(duels, scores) == {"reward_win_rate": 0.5}
    assert second_opinion(duels, scores[:2]) == {"reward_win_rate": 1.0}
    assert second_opinion(duels, []) == {}


def test_a_good_policy_passes_and_each_fault_is_named():
    section = EvaluateSection()
    assert failures(GOOD, START, section) == []
    assert "not surely above 0.50" in failures(GOOD | {"low": 0.5}, START, section)[0]
    assert "mean length changed by -25%" in failures(GOOD | {"length_change": -0.25}, START, section)[0]
    assert "looping replies rose by 8%" in failures(GOOD | {"repeated_share": 0.10}, START, section)[0]
    assert len(failures(GOOD | {"low": 0.1, "length_change": 1.0, "repeated_share": 1.0}, START, section)) == 3
