"""The gap rule and the published column layout."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from psyray.config import PairsSection
from psyray.data.pairs import build_pairs, from_layout, to_layout
from psyray.rubric import load_rubric

RUBRIC = load_rubric("counselling")
SPEECH = [{"role": "user", "content": "I cannot sleep."}]


def judged(*scores: float, speech: str = "s") -> list[dict]:
    return [
        {"response_id": f"{speech}{i}", "speech_id": speech, "messages": SPEECH, "split": "train", "model": "m",
         "text": f"reply {i}", "ratings": dict.fromkeys(RUBRIC.keys, score), "score": score, "status": "ok"}
        for i, score in enumerate(scores)
    ]  # fmt: skip


def build(rows, **settings):
    return build_pairs(rows, PairsSection(**settings), RUBRIC)


def test_all_pairs_above_the_gap_and_none_below():
    pairs, dropped = build(judged(1.0, 2.0, 2.4, 4.0), gap=0.5)
    assert [(p["chosen_id"], p["rejected_id"]) for p in pairs] == [
        ("s3", "s0"), ("s3", "s1"), ("s3", "s2"), ("s2", "s0"), ("s1", "s0")
    ]  # fmt: skip
    assert dropped == {"gap too small": 1}


def test_the_gap_itself_is_wide_enough():
    assert len(build(judged(2.0, 3.0), gap=1.0)[0]) == 1
    assert len(build(judged(2.0, 2.999), gap=1.0)[0]) == 0


def test_the_gap_on_the_total_is_seven_times_that_on_the_mean():
    assert len(build(judged(3.0, 3.2), gap=1.0, gap_on="total")[0]) == 1
    assert len(build(judged(3.0, 3.2), gap=1.0, gap_on="mean")[0]) == 0


def test_best_worst_and_at_most_n():
    assert [p["chosen_id"] for p in build(judged(3.0, 1.0, 5.0), gap=0.5, rule="best_worst")[0]] == ["s2"]
    pairs, dropped = build(judged(1.0, 2.0, 3.0, 4.0), gap=0.5, max_per_speech=2)
    assert [p["margin"] for p in pairs] == [3.0, 2.0] and dropped["over pairs.max_per_speech"] == 4


def test_ties_same_texts_and_lonely_responses_never_become_pairs():
    assert build(judged(3.0, 3.0), gap=0.1) == ([], {"gap too small": 1})
    twins = judged(1.0, 5.0)
    twins[1]["text"] = " reply  0 "
    assert build(twins, gap=0.1) == ([], {"same text": 1})
    assert build(judged(3.0), gap=0.1) == ([], {"one response only": 1})


@given(st.lists(st.integers(4, 20), min_size=2, max_size=5), st.randoms())
def test_pairs_do_not_depend_on_the_order_of_the_responses(scores, random):
    rows = judged(*(s / 4 for s in scores))
    mixed = rows[:]
    random.shuffle(mixed)
    assert build(rows, gap=0.5) == build(mixed, gap=0.5)


def test_the_published_layout_goes_out_and_comes_back():
    pairs, _ = build(judged(1.0, 4.0) + judged(2.0, 5.0, speech="t"), gap=0.5)
    layout = to_layout(pairs, RUBRIC.keys)
    assert layout.column_names[:7] == [
        "ID", "prefID", "question", "chosen", "rejected", "chosen_model", "rejected_model"
    ]  # fmt: skip
    assert layout.schema.field("ID").type == pa.string() and layout.schema.field("prefID").type == pa.int64()
    assert layout["chosen_safety_rating"].to_pylist() == [4, 5] and layout["prefID"].to_pylist() == [0, 1]
    back = [from_layout(row, SPEECH, RUBRIC) for row in layout.to_pylist()]
    assert [(p["chosen"], p["rejected"], p["margin"]) for p in back] == [("reply 1", "reply 0", 3.0)] * 2


def test_a_missing_rating_leaves_the_margin_at_zero():
    row = to_layout(build(judged(1.0, 4.0), gap=0.5)[0], RUBRIC.keys).to_pylist()[0] | {"chosen_safety_rating": None}
    pair = from_layout(row, SPEECH, RUBRIC)
    assert pair["margin"] == 0.0 and "safety" not in pair["chosen_ratings"] and "safety" in pair["rejected_ratings"]


def test_a_pair_knows_whether_its_speech_speaks_of_a_crisis():
    rows = [row | {"crisis": True} for row in judged(1.0, 4.0)]
    assert [p["crisis"] for p in build(rows, gap=0.5)[0]] == [True]
