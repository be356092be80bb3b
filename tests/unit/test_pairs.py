"""The pair rules, by hand and as laws, and the stage that applies them to a run's rows."""

from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_pairs import RUBRIC, judged, made_pairs, made_rows

from psyray.config import load_config
from psyray.data.layout import from_layout
from psyray.data.pairs import LAYOUT, build_pairs
from psyray.data.rules import Rules
from psyray.errors import PsyrayError
from psyray.records import content_id
from psyray.sections.data import PairsSection

FLAT = dict.fromkeys(RUBRIC.keys, 3.0)


def build(rows, rubric=RUBRIC, **settings):
    dropped = Counter()
    return list(build_pairs(lambda: rows, Rules.make(PairsSection(**settings), rubric), dropped)), +dropped


def sides(pairs):
    return [(p["chosen_id"], p["rejected_id"]) for p in pairs]


def test_all_pairs_above_the_gap_and_none_below():
    pairs, dropped = build(judged(1.0, 2.0, 2.4, 4.0), gap=0.5)
    assert sides(pairs) == [("s3", "s0"), ("s3", "s1"), ("s3", "s2"), ("s2", "s0"), ("s1", "s0")]
    assert dropped == {"gap too small": 1}


def test_the_gap_itself_is_wide_enough():
    assert len(build(judged(2.0, 3.0), gap=1.0)[0]) == 1
    assert len(build(judged(2.0, 2.999), gap=1.0)[0]) == 0


def test_the_gap_on_the_total_is_seven_times_that_on_the_mean():
    assert len(build(judged(3.0, 3.2), gap=1.0, gap_on="total")[0]) == 1
    assert len(build(judged(3.0, 3.2), gap=1.0, gap_on="mean")[0]) == 0


def test_one_rating_point_is_a_gap_of_one_on_the_total():
    (pair,), _ = build(judged(FLAT, FLAT | {"empathy": 4.0}), gap=1.0, gap_on="total")
    assert pair["chosen_id"] == "s1" and pair["margin"] == pytest.approx(1.0)


def test_a_named_principle_alone_decides_who_is_chosen():
    brief, warm = FLAT | {"clarity": 5.0, "empathy": 1.0}, FLAT | {"empathy": 4.0, "clarity": 3.0}
    (pair,), _ = build(judged(warm, brief), gap=2.0, gap_on="principle", principles=["clarity"])
    assert pair["chosen_id"] == "s1" and pair["margin"] == 2.0
    assert build(judged(warm, brief), gap=2.5, gap_on="principle", principles=["clarity"]) == ([], {"gap too small": 1})


def test_a_lead_on_at_least_n_principles():
    better = FLAT | {"empathy": 4.0, "clarity": 4.5, "autonomy": 3.5}
    settings = {"gap": 1.0, "gap_on": "principle"}
    assert sides(build(judged(FLAT, better), at_least=2, **settings)[0]) == [("s1", "s0")]
    assert build(judged(FLAT, better), at_least=3, **settings)[0] == []
    # Two leads do not choose a response whose mean is lower.
    mixed = dict.fromkeys(RUBRIC.keys, 1.0) | {"empathy": 4.0, "clarity": 4.0}
    assert build(judged(FLAT, mixed), at_least=2, veto=[], **settings)[0][0]["chosen_id"] == "s0"


def test_best_worst_and_at_most_n():
    assert [p["chosen_id"] for p in build(judged(3.0, 1.0, 5.0), gap=0.5, rule="best_worst")[0]] == ["s2"]
    pairs, dropped = build(judged(1.0, 2.0, 3.0, 4.0), gap=0.5, max_per_speech=2)
    assert [p["margin"] for p in pairs] == [3.0, 2.0] and dropped["over pairs.max_per_speech"] == 4


def test_ties_same_texts_and_lonely_responses_never_become_pairs():
    assert build(judged(3.0, 3.0), gap=0.1) == ([], {"gap too small": 1})
    assert build(judged(1.0, 5.0, texts=["a reply", " a  reply"]), gap=0.1) == ([], {"same text": 1})
    assert build(judged(3.0), gap=0.1) == ([], {"one response only": 1})


def test_a_response_that_is_less_safe_is_never_chosen():
    unsafe = dict.fromkeys(RUBRIC.keys, 5.0) | {"safety": 2.0}
    assert build(judged(FLAT, unsafe), gap=0.5) == ([], {"better but lower on safety": 1})
    assert len(build(judged(FLAT, unsafe), gap=0.5, veto=[])[0]) == 1
    equal = unsafe | {"safety": 3.0}
    assert len(build(judged(FLAT, equal), gap=0.5)[0]) == 1
    assert build(judged(FLAT, equal | {"clarity": 2.0}), gap=0.5, veto=["clarity"])[1] == {
        "better but lower on clarity": 1
    }


def test_a_rubric_without_safety_has_no_veto_unless_one_is_named():
    other = replace(RUBRIC, name="law", principles=tuple(p for p in RUBRIC.principles if p.key != "safety"))
    assert Rules.make(PairsSection(), other).veto == () and Rules.make(PairsSection(), RUBRIC).veto == ("safety",)
    with pytest.raises(PsyrayError, match=r"pairs.veto: the rubric law has no principle safety; it has empathy"):
        Rules.make(PairsSection(veto=["safety"]), other)
    with pytest.raises(PsyrayError, match=r"pairs.principles: the rubric counselling has no principle humour"):
        Rules.make(PairsSection(gap_on="principle", principles=["humour"]), RUBRIC)
    with pytest.raises(PsyrayError, match=r"pairs.at_least is 8, but the rubric has 7"):
        Rules.make(PairsSection(gap_on="principle", at_least=8), RUBRIC)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["pairs.principles=[clarity]"], "need pairs.gap_on principle"),
        (["pairs.gap_on=principle", "pairs.principles=[clarity]", "pairs.at_least=2"], "more than the 1 principles"),
    ],
)
def test_rules_that_cannot_go_together_are_refused(settings, expected):
    with pytest.raises(PsyrayError, match=expected):
        load_config(None, settings)


def test_a_bound_on_the_length_ratio():
    texts = ["x" * 10, "y" * 20, "z" * 21]
    pairs, dropped = build(judged(1.0, 2.0, 3.0, texts=texts), gap=0.5, max_length_ratio=2.0)
    assert sides(pairs) == [("s1", "s0"), ("s2", "s1")] and dropped == {"over pairs.max_length_ratio": 1}


def lengths(*chosen_rejected):
    """One speech for each pair of lengths, the first one chosen; ids spread the draw."""
    return [
        row
        for i, (a, b) in enumerate(chosen_rejected)
        for row in judged(4.0, 2.0, speech=content_id(i), texts=["x" * a, "y" * b])
    ]


def test_balancing_drops_the_surplus_of_the_commoner_direction():
    # One band of ratios: 5 where the chosen one is longer, 2 where it is shorter, and one of equal length.
    pairs, dropped = build(lengths(*[(12, 10)] * 5, (10, 12), (10, 13), (10, 10)), balance_length=True)
    longer = [len(p["chosen"]) - len(p["rejected"]) for p in pairs]
    assert sum(d > 0 for d in longer) == 2 and sum(d < 0 for d in longer) == 2 and longer.count(0) == 1
    assert dropped == {"to balance the lengths": 3}


def test_balancing_is_within_a_band_of_the_length_ratio():
    # Four times as long is another band than a fifth longer: the one cannot make up for the other.
    pairs, dropped = build(lengths((40, 10), (40, 10), (10, 12), (12, 10)), balance_length=True)
    assert sorted(len(p["chosen"]) for p in pairs) == [10, 12] and dropped == {"to balance the lengths": 2}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(5, 60), st.integers(5, 60)), min_size=1, max_size=30))
def test_after_balancing_the_chosen_one_is_longer_as_often_as_shorter(sizes):
    pairs, dropped = build(lengths(*sizes), balance_length=True)
    longer = [len(p["chosen"]) - len(p["rejected"]) for p in pairs]
    assert sum(d > 0 for d in longer) == sum(d < 0 for d in longer)
    assert len(pairs) + dropped["to balance the lengths"] == len(sizes)
    assert longer.count(0) == sum(a == b for a, b in sizes)
    again, _ = build(lengths(*sizes), balance_length=True)
    assert again == pairs


RATED = st.fixed_dictionaries({key: st.integers(4, 20).map(lambda n: n / 4) for key in RUBRIC.keys})
SETTINGS = st.fixed_dictionaries(
    {
        "gap": st.sampled_from([0.25, 0.5, 1.0]),
        "gap_on": st.sampled_from(["mean", "total", "principle"]),
        "rule": st.sampled_from(["all", "best_worst"]),
        "veto": st.sampled_from([None, [], ["clarity", "safety"]]),
    }
)


@settings(deadline=None)
@given(RATED, RATED, SETTINGS)
def test_swapping_the_ratings_swaps_chosen_and_rejected(a, b, settings):
    pairs, dropped = build(judged(a, b), **settings)
    swapped, dropped_too = build(judged(b, a), **settings)
    assert sides(swapped) == [(rejected, chosen) for chosen, rejected in sides(pairs)]
    assert dropped == dropped_too and [p["margin"] for p in swapped] == [p["margin"] for p in pairs]


@settings(deadline=None)
@given(st.lists(RATED, min_size=2, max_size=5), SETTINGS)
def test_the_veto_and_the_gap_hold_for_whatever_ratings(ratings, settings):
    rubric_veto = {"safety"} if settings["veto"] is None else set(settings["veto"])
    pairs, dropped = build(judged(*ratings), **settings)
    for pair in pairs:
        assert all(pair["chosen_ratings"][key] >= pair["rejected_ratings"][key] for key in rubric_veto)
        assert pair["margin"] > 0
        if settings["gap_on"] != "principle":
            assert pair["margin"] >= settings["gap"] - 1e-6
    candidates = len(ratings) * (len(ratings) - 1) // 2 if settings["rule"] == "all" else 1
    assert len(pairs) + sum(dropped.values()) == candidates


@settings(deadline=None)
@given(st.lists(st.integers(4, 20), min_size=2, max_size=5), st.randoms())
def test_pairs_do_not_depend_on_the_order_of_the_responses(scores, order):
    rows = judged(*(s / 4 for s in scores))
    mixed = rows[:]
    order.shuffle(mixed)
    assert build(rows, gap=0.5) == build(mixed, gap=0.5)


def test_the_stage_makes_the_pairs_that_the_rules_make(tmp_path):
    responses, judgements = made_rows(40)
    made = made_pairs(tmp_path / "run [1]", responses, judgements, gap=1.0)
    together = sorted(responses, key=lambda r: (r["speech_id"], r["response_id"]))
    expected, dropped = build(together, gap=1.0)
    assert {p["pair_id"]: p["chosen_id"] for p in made.rows()} == {p["pair_id"]: p["chosen_id"] for p in expected}
    splits = Counter(p["split"] for p in expected)
    assert made.stats == {"train": splits["train"], "test": splits["test"], "dropped": dict(dropped)}
    assert not (made.path / ".spill").exists()


def test_the_stage_leaves_out_failed_rows_on_either_side(tmp_path):
    responses, judgements = made_rows(6)
    responses[0] |= {"status": "failed", "text": None}
    judgements[0] |= {"status": "invalid", "ratings": None, "score": None}
    out = {responses[0]["response_id"], judgements[0]["response_id"]}
    made = made_pairs(tmp_path / "run", responses, judgements, gap=0.5)
    assert made.rows() and not out & {row[f"{side}_id"] for row in made.rows() for side in ("chosen", "rejected")}


def test_the_stage_balances_lengths_over_all_speeches(tmp_path):
    responses, judgements = made_rows(40)
    for number, row in enumerate(responses):
        row["text"] = f"reply {row['response_id']} " + "word " * (number % 7)
    made = made_pairs(tmp_path / "run", responses, judgements, gap=1.0, balance_length=True)
    for split in ("train", "test"):
        differences = [
            len(p["chosen"].strip()) - len(p["rejected"].strip()) for p in made.rows() if p["split"] == split
        ]
        assert sum(d > 0 for d in differences) == sum(d < 0 for d in differences) > 0
    assert made.stats["dropped"]["to balance the lengths"] > 0


def test_no_training_pair_is_an_error_that_names_the_reasons(tmp_path):
    responses, judgements = made_rows(4)
    with pytest.raises(PsyrayError, match=r"no training pair is left \(.*gap too small.*lower pairs.gap \(now 9.0\)"):
        made_pairs(tmp_path / "run", responses, judgements, gap=9.0)


def test_the_published_layout_goes_out_and_comes_back(tmp_path):
    responses, judgements = made_rows(12)
    made = made_pairs(tmp_path / "run", responses, judgements, gap=1.0)
    layout = pq.read_table(made.path / LAYOUT)
    assert layout.column_names[:7] == [
        "ID", "prefID", "question", "chosen", "rejected", "chosen_model", "rejected_model"
    ]  # fmt: skip
    assert layout.schema.field("ID").type == pa.string() and layout.schema.field("prefID").type == pa.int64()
    rows = made.rows()
    assert sorted(zip(layout["ID"].to_pylist(), layout["prefID"].to_pylist(), strict=True)) == sorted(
        (p["speech_id"], int(p["pair_id"][:15], 16)) for p in rows
    )
    by_id = {int(p["pair_id"][:15], 16): p for p in rows}
    assert layout["ID"].to_pylist() == sorted(layout["ID"].to_pylist())
    for row in layout.to_pylist():
        pair = by_id[row["prefID"]]
        back = from_layout(row, pair["messages"], RUBRIC)
        assert row["chosen_safety_rating"] == pair["chosen_ratings"]["safety"]
        for side in ("chosen", "rejected"):
            assert back[side] == pair[side] and back[f"{side}_ratings"] == pair[f"{side}_ratings"]
        assert back["margin"] == pytest.approx(pair["margin"])


def test_where_a_rating_is_missing_there_is_no_margin():
    row = dict.fromkeys((f"{side}_{key}_rating" for side in ("chosen", "rejected") for key in RUBRIC.keys), 3)
    row |= {"chosen": "a reply", "rejected": "another", "chosen_safety_rating": None}
    pair = from_layout(row, judged(1.0)[0]["messages"], RUBRIC)
    assert pair["margin"] is None and "safety" not in pair["chosen_ratings"] and "safety" in pair["rejected_ratings"]


@pytest.mark.parametrize(
    ("value", "rating", "unusable"),
    [(4, 4.0, 0), ("4", 4.0, 0), (" 3.5 ", 3.5, 0), (1, 1.0, 0), (5, 5.0, 0), (None, None, 0), (" ", None, 0),
     (float("nan"), None, 1), ("nan", None, 1), (float("inf"), None, 1), (True, None, 1), ("N/A", None, 1),
     ([4], None, 1), (0, None, 1), (5.1, None, 1), pytest.param(10**400, None, 1, id="huge")],
)  # fmt: skip
def test_a_rating_is_a_number_on_the_scale_or_missing(value, rating, unusable):
    row = dict.fromkeys((f"{side}_{key}_rating" for side in ("chosen", "rejected") for key in RUBRIC.keys), 3)
    row |= {"chosen": "a reply", "rejected": "another", "chosen_safety_rating": value}
    counts = Counter()
    pair = from_layout(row, judged(1.0)[0]["messages"], RUBRIC, counts)
    assert pair["chosen_ratings"].get("safety") == rating and len(pair["rejected_ratings"]) == len(RUBRIC.keys)
    assert pair["margin"] == (None if rating is None else pytest.approx((rating - 3) / len(RUBRIC.keys)))
    assert counts == Counter({"unusable ratings": unusable} if unusable else {})


def test_a_pair_knows_whether_its_speech_speaks_of_a_crisis(tmp_path):
    rows = [row | {"crisis": True} for row in judged(1.0, 4.0)]
    assert [p["crisis"] for p in build(rows, gap=0.5)[0]] == [True]
    responses, judgements = made_rows(4)
    for row in responses:
        row["crisis"] = row["speech_id"] == responses[0]["speech_id"]
    flags = {p["speech_id"]: p["crisis"] for p in made_pairs(tmp_path / "run", responses, judgements, gap=0.5).rows()}
    assert {key: key == responses[0]["speech_id"] for key in flags} == flags
