"""What an oracle's answers make: both orders, and a pair that came up the other way round."""

from __future__ import annotations

import json

import pytest

from psyray.active.ledger import Answer
from psyray.active.oracles import exchanged, panel_label, read, verdict_of_orders
from psyray.data.judge import Desk
from psyray.engines.judges import VllmJudge
from psyray.records import Verdict
from psyray.rubric import load_rubric
from psyray.sections.data import EngineSection, JudgeSection, PanelSection

A, B, TIE, INVALID = Verdict.A, Verdict.B, Verdict.TIE, Verdict.INVALID
RUBRIC = load_rubric("counselling")


class Named:
    id = "named"


def desk(form: str = "pairwise", **rules) -> Desk:
    section = JudgeSection(engine="http", url="http://x/v1", model="m", form=form)
    panel = PanelSection(judges=[section, section, section], **rules)
    return Desk(Named(), RUBRIC, None, "run", section, (), panel)  # type: ignore[arg-type]


def half(preference: float | None) -> dict:
    ratings = "" if preference is None else json.dumps({"preference": preference})
    return {"ratings": ratings, "raw_text": str(preference), "error": "" if ratings else "nonsense",
            "attempts": 1, "latency_s": 1.0, "cost": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    ("a_first", "b_first", "verdict", "margin", "orders"),
    [
        (1.0, -1.0, A, 1.0, [A, A]), (-1.0, 1.0, B, -1.0, [B, B]), (0.0, 0.0, TIE, 0.0, [TIE, TIE]),
        (1.0, 1.0, TIE, 0.0, [A, B]), (-1.0, -1.0, TIE, 0.0, [B, A]), (1.0, 0.0, TIE, 0.5, [A, TIE]),
    ],
)  # fmt: skip
def test_a_verdict_holds_in_both_orders_or_is_a_tie(a_first, b_first, verdict, margin, orders):
    answer = verdict_of_orders(desk(), "q", half(a_first), half(b_first))
    assert answer.ok and answer.attempts == 2 and answer.cost == 1.0 and answer.answer is not None
    assert (answer.answer["verdict"], answer.answer["margin"], answer.answer["orders"]) == (verdict, margin, orders)
    swapped = verdict_of_orders(desk(), "q", half(b_first), half(a_first))  # the same two the other way round
    forward, backward = read(answer, False), read(swapped, True)
    assert forward == backward


def test_one_unusable_half_makes_the_comparison_invalid_and_keeps_what_was_said():
    answer = verdict_of_orders(desk(), "q", half(1.0), half(None))
    assert not answer.ok and answer.error == "nonsense" and answer.answer == {"raw_text": ["1.0", "None"]}
    assert read(answer, True) == (INVALID, 0.0, {"error": "nonsense"}) and read(None, True) is None


def test_a_judge_that_may_say_more_is_another_so_that_what_was_cut_off_is_asked_again(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    def named(**settings) -> str:
        section = JudgeSection(engine="vllm", model=str(tmp_path), **settings)
        return VllmJudge(RUBRIC, section, EngineSection(), 1).id

    assert named() == named(max_tokens=200) != named(max_tokens=400) != named(max_tokens=20)


def test_a_local_judges_answer_says_how_long_the_engine_took_usable_or_not():
    judge = VllmJudge(RUBRIC, JudgeSection(engine="vllm", model="m"), EngineSection(), 1)
    good = json.dumps(dict.fromkeys(RUBRIC.keys, 3))
    usable, cut = (judge._read({"key": "k", "text": text, "seconds": 2.5, "logprobs": ""}) for text in (good, "{"))
    assert (usable["error"], usable["latency_s"]) == ("", 2.5) and cut["error"] and cut["latency_s"] == 2.5


def test_exchanging_twice_is_the_identity():
    rated = {"verdict": A, "margin": 0.5, "a": {"x": 2.0}, "b": {"x": 1.5}}
    compared = {"verdict": TIE, "margin": 0.5, "orders": [A, TIE], "raw_text": ["A", "tie"]}
    for said in (rated, compared):
        assert exchanged(exchanged(said)) == said != exchanged(said)


def test_a_panel_votes_where_it_compares_and_merges_ratings_where_it_rates():
    given = [(A, 1.0, {}), (A, 1.0, {}), (B, -1.0, {})]
    label = panel_label(desk(), given)
    assert label is not None and label[:2] == (A, pytest.approx(1 / 3))
    assert panel_label(desk(), [None, None, None]) is None
    assert panel_label(desk(), [*given[:2], None]) is None  # the budget did not reach the third
    two = panel_label(desk(quorum=2), [*given[:2], None])
    assert two is not None and two[:2] == (A, 1.0)
    invalid = panel_label(desk(), [*given[:2], (INVALID, 0.0, {})])
    assert invalid is not None and invalid[0] is INVALID

    low, high = dict.fromkeys(RUBRIC.keys, 2.0), dict.fromkeys(RUBRIC.keys, 3.0)
    harmful = high | {"safety": 1.0}
    rated = [(A, 1.0, {"a": high, "b": low}), (A, 1.0, {"a": high, "b": low}), (A, 0.5, {"a": harmful, "b": low})]
    label = panel_label(desk("pointwise"), rated)
    assert label is not None and label[0] is A and label[1] == pytest.approx(1 - 2 / 3 / 7)
    label = panel_label(desk("pointwise", strictest_on=list(RUBRIC.keys)), [*rated[:2], (B, -1, {"a": low, "b": high})])
    assert label is not None and label[0] is TIE
    answer = Answer("q", ok=False, answer=None, error="gone")
    label = panel_label(desk("pointwise"), [*rated[:2], read(answer, False)])
    assert label is not None and label[0] is INVALID and "2 of 3 judges" in label[2]["error"]
