"""The pure parts of the online loop: prompts, draws, labels, replay."""

import numpy as np
import pytest

from psyray.config import Config, Responder, load_config
from psyray.data.generate import draw, draw_row, with_system
from psyray.loop import oracle_pairs, prompts, reward_pairs
from psyray.records import Verdict


def speeches(count: int) -> list[dict]:
    return [{"speech_id": f"{i:03d}", "split": "test" if i % 4 == 0 else "train"} for i in range(count)]


def config(**loop: object) -> Config:
    return load_config(None, [f"loop.{key}={value}" for key, value in loop.items()])


def test_rounds_take_new_prompts_until_all_had_a_turn():
    rounds = [prompts(speeches(40), n, config(rounds=5, prompts=10)) for n in (1, 2, 3, 4)]
    first_three = [s["speech_id"] for r in rounds[:3] for s in r]
    assert len(first_three) == len(set(first_three)) == 30
    assert rounds[3] == rounds[0]
    assert all(s["split"] == "train" for r in rounds for s in r)


def test_there_are_no_prompts_after_the_last_round_and_no_more_than_there_are_speeches():
    assert prompts(speeches(40), 3, config(rounds=2)) == []
    assert len(prompts(speeches(8), 1, config(rounds=1, prompts=100))) == 6


def test_no_responder_is_drawn_twice_before_all_had_a_turn():
    pool = [Responder(name=name) for name in "abc"]
    drawn = draw("speech", pool, 5, seed=0)
    assert len({r.name for r, _ in drawn[:3]}) == 3 and len({seed for _, seed in drawn}) == 5
    assert drawn == draw("speech", pool, 5, seed=0)
    assert [r.name for s in range(20) for r, _ in draw(f"s{s}", pool, 3, 0)] != ["a", "b", "c"] * 20


def test_a_response_has_its_id_before_it_has_text_and_it_depends_on_responder_and_seed():
    speech = {"speech_id": "s", "messages": [{"role": "user", "content": "Hi."}], "split": "train"}
    ids = [draw_row(speech, Responder(name="a"), who, seed)["response_id"] for who in "xy" for seed in (1, 2)]
    assert len(set(ids)) == 4
    assert ids[0] == draw_row(speech, Responder(name="a"), "x", 1)["response_id"]


def test_a_conversation_keeps_its_own_system_prompt():
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "Hi."}]
    assert with_system(own, "yours") == own
    assert with_system(own[1:], "yours")[0] == {"role": "system", "content": "yours"}
    assert with_system(own[1:], "") == own[1:]


def responses(*texts: str, speech: str = "s") -> list[dict]:
    return [
        {"response_id": f"{speech}{i}", "speech_id": speech, "messages": [], "split": "train", "text": t, "model": "m"}
        for i, t in enumerate(texts)
    ]


def test_the_oracles_ties_and_invalid_answers_never_become_pairs():
    a, b = responses("a", "b")
    labels = [(Verdict.A, 0.5, {}), (Verdict.B, -0.5, {}), (Verdict.TIE, 0.0, {}), (Verdict.INVALID, 0.0, {}), None]
    pairs, counts = oracle_pairs([(a, b, 1.0)] * 5, labels, gaps=[0.2] * 5)
    assert [(p["chosen_id"], p["rejected_id"], p["margin"]) for p in pairs] == [("s0", "s1", 0.5), ("s1", "s0", 0.5)]
    assert counts == {"ties": 1, "invalid": 1, "agreement": 0.5}
    assert oracle_pairs([], [], [])[1]["agreement"] is None


def test_the_reward_model_labels_only_what_the_oracle_did_not_and_only_above_the_margin():
    groups = [responses("a", "b", "c", speech="s"), responses("a", "b", "c", speech="t")]
    mean_PK = np.array([[3.0, 0.0, 1.0], [2.0, 1.9, np.nan]])
    pairs = reward_pairs(groups, mean_PK, labelled=set(), per_speech=2, margin=0.5)
    assert [(p["chosen_id"], p["rejected_id"], p["margin"]) for p in pairs] == [("s0", "s1", 3.0), ("s0", "s2", 2.0)]
    assert {p["source"] for p in pairs} == {"reward"}
    assert reward_pairs(groups, mean_PK, labelled={0}, per_speech=2, margin=0.5) == []


def test_equal_texts_are_no_pair_whatever_the_scores_say():
    assert reward_pairs([responses("same", "same")], np.array([[3.0, 0.0]]), set(), 1, 0.1) == []


@pytest.mark.parametrize(("given", "expected"), [(Verdict.A, "s0"), (Verdict.B, "s1")])
def test_a_question_is_one_question_whichever_way_the_pair_came_up(given, expected):
    from psyray.active.ledger import Answer
    from psyray.active.oracles import comparison_question, read
    from psyray.config import JudgeSection
    from psyray.data.judge import Desk
    from psyray.engines.judges import RuleJudge
    from psyray.rubric import load_rubric

    rubric = load_rubric("counselling")
    desk = Desk(RuleJudge(rubric), rubric, None, "run", JudgeSection())  # type: ignore[arg-type]
    a, b = responses("first", "second")
    (ab, ab_flipped), (ba, ba_flipped) = (comparison_question(desk, *pair, "random", {}) for pair in ((a, b), (b, a)))
    assert ab.question_id == ba.question_id and ab.payload == ba.payload and ab_flipped != ba_flipped
    answer = Answer(ab.question_id, True, {"verdict": given.swap() if ab_flipped else given, "margin": 0.5})
    winners = [
        pair[0] if label[0] is Verdict.A else pair[1]
        for pair, label in (((a, b), read(answer, ab_flipped)), ((b, a), read(answer, ba_flipped)))
    ]
    assert [w["response_id"] for w in winners] == [expected, expected]
