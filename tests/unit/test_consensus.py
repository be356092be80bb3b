"""A panel of judges: its rules by hand, what is missing, and how far the judges agree."""

from __future__ import annotations

import json

import pytest

from psyray.config import load_config
from psyray.data.consensus import judges_agreement, merge, panel_rows, verdicts_agreement, vote
from psyray.engines.judges import make_panel
from psyray.errors import PsyrayError
from psyray.evaluate import agreement
from psyray.records import Verdict
from psyray.rubric import Principle, Rubric, UnusableAnswer
from psyray.sections.data import JudgeSection, PanelSection

A, B, TIE, INVALID = Verdict.A, Verdict.B, Verdict.TIE, Verdict.INVALID
REVIEW = Rubric("code review", 0, 4, "author", (Principle("right", "Right", 3, ""), Principle("safe", "Safe", 1, "")),
                "{conversation} {response}", "{keys}")  # fmt: skip
JUDGES = [JudgeSection(engine="http", url="http://x/v1", model=name) for name in "abc"]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(agreement, "RESAMPLES", 20)


def panel(**rules) -> PanelSection:
    return PanelSection(judges=JUDGES, **rules)


def said(*pairs):
    return [pair and dict(zip(("right", "safe"), pair, strict=True)) for pair in pairs]


@pytest.mark.parametrize(
    ("rules", "given", "expected"),
    [
        ({}, said((4, 1), (1, 2), (4, 3)), (3, 2)),
        ({"rule": "median"}, said((4, 0), (1, 2), (4, 3)), (4, 2)),
        ({"rule": "majority"}, said((4, 3), (4, 3), (0, 3)), (4, 3)),
        ({"strictest_on": ["safe"]}, said((4, 4), (4, 0), (4, 4)), (4, 0)),
        ({"rule": "majority", "strictest_on": ["safe"]}, said((4, 4), (4, 0), (1, 3)), (4, 0)),
        ({"quorum": 2}, said((4, 1), None, (2, 3)), (3, 2)),
        ({"rule": "majority", "quorum": 2, "agree": 2}, said((4, 1), None, (4, 1)), (4, 1)),
    ],
)
def test_the_rules(rules, given, expected):
    assert tuple(merge(given, REVIEW, panel(**rules)).values()) == expected


@pytest.mark.parametrize(
    ("rules", "given", "reason"),
    [
        ({}, said((4, 1), None, (4, 3)), "2 of 3 judges gave a usable answer, 3 must"),
        ({"quorum": 1}, said(None, None, None), "0 of 3 judges"),
        ({"rule": "majority"}, said((4, 1), (4, 2), (4, 3)), "no 2 judges give the same rating for safe"),
        ({"rule": "majority", "agree": 3}, said((4, 1), (4, 1), (3, 1)), "no 3 judges .* for right"),
    ],
)
def test_what_the_rules_cannot_settle_is_no_number(rules, given, reason):
    with pytest.raises(UnusableAnswer, match=reason):
        merge(given, REVIEW, panel(**rules))


@pytest.mark.parametrize(
    ("rules", "verdicts", "expected"),
    [
        ({}, [A, A, B], A), ({}, [A, B, TIE], TIE), ({"agree": 3}, [A, A, B], TIE), ({}, [A, A, INVALID], INVALID),
        ({"quorum": 2}, [A, A, INVALID], A), ({"quorum": 2}, [A, B, INVALID], TIE), ({}, [TIE, TIE, A], TIE),
    ],
)  # fmt: skip
def test_votes(rules, verdicts, expected):
    assert vote(verdicts, panel(**rules)) is expected
    assert vote([v.swap() for v in verdicts], panel(**rules)) is expected.swap()


def row(judge: str, response: str, *ratings: float) -> dict:
    rated = dict(zip(("right", "safe"), ratings, strict=True)) if ratings else None
    outcome = {"status": "ok", "error": ""} if rated else {"status": "invalid", "error": "no JSON"}
    made = {"response_id": response, "speech_id": f"s{response}", "judge": judge, "ratings": rated}
    return made | outcome | {"score": None, "raw_text": "", "attempts": 2}


def test_a_panels_row_keeps_what_each_judge_said():
    answered = [[row("a", "1", 4, 4), row("a", "2", 4, 0), row("a", "3", 1, 1), row("a", "4", 1, 1)],
                [row("b", "2"), row("b", "1", 2, 0), row("b", "3")],
                [row("c", "1", 3, 2), row("c", "2", 2, 2)]]  # fmt: skip
    one, two, three = panel_rows(answered, "panel-x", REVIEW, panel(quorum=2))  # the fourth was put to one judge only
    assert one["ratings"] == {"right": 3, "safe": 2} and one["score"] == 2.75 and one["attempts"] == 6
    assert two["ratings"] == {"right": 3, "safe": 1} and two["status"] == "ok" and "b: no JSON" in two["error"]
    assert three["score"] is None and three["status"] == "invalid" and "1 of 3 judges" in three["error"]
    kept = json.loads(three["raw_text"])
    assert kept[0]["ratings"] == {"right": 1, "safe": 1} and kept[1]["ratings"] is None and kept[2] is None
    assert [r["judge"] for r in (one, two, three)] == ["panel-x"] * 3


def test_judges_that_agree_and_judges_that_do_not():
    ratings = [(4, 4), (0, 1), (2, 3), (1, 0)]
    same = [[row(judge, str(n), *r) for n, r in enumerate(ratings)] for judge in "abc"]
    found = judges_agreement(panel_rows(same, "p", REVIEW, panel()), REVIEW)
    assert found["value"] == 1.0 and found["principles"] == {"right": 1.0, "safe": 1.0} and found["responses"] == 4
    # By hand, two judges, one principle over 0 1 | 1 0: squared differences 1 and 1 observed, 2/3 expected
    other = [[row("a", "1", 0, 4), row("a", "2", 1, 4)], [row("b", "1", 1, 4), row("b", "2", 0, 4)]]
    found = judges_agreement(panel_rows(other, "p", REVIEW, panel(quorum=2)), REVIEW)
    assert found["principles"]["right"] == pytest.approx(1 - 1 / (2 / 3)) and found["principles"]["safe"] is None


def test_judges_verdicts_agree_as_alpha_says():
    # Two judges, four comparisons, one disagreement: 2 of 8 coincidences, and 2 * 5 * 3 / 7 by chance (five A, three B)
    found = verdicts_agreement([[A, A], [A, A], [B, B], [A, B], [A, None], [INVALID, B]], [f"s{n}" for n in range(6)])
    assert found["value"] == pytest.approx(1 - 2 / (2 * 5 * 3 / 7))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["panel.judges=[{engine: rule}]"], "a panel needs two judges or more"),
        (["panel.judges=[{engine: rule}, {engine: vllm, model: m}]", "panel.quorum=3"], "must not exceed the 2 judges"),
        (["panel.judges=[{engine: rule}, {engine: vllm, model: m, form: pairwise}]"], "all have the same form"),
        (["panel.judges=[{engine: rule}, {engine: vllm, model: m}]", "panel.agree=1"], "more than half of the judges"),
    ],
)
def test_a_panel_that_cannot_be_is_named(words, expected):
    with pytest.raises(PsyrayError, match=expected):
        load_config(None, words)


def test_a_judge_sits_on_a_panel_once_and_principles_are_the_rubrics():
    class Named:
        def __init__(self, id: str) -> None:
            self.id = id

    twice = [*JUDGES, JUDGES[1].model_copy(update={"mode": "soft", "max_tokens": 9, "url": "http://x/v1/"})]
    said = r"panel\.judges\.1 and panel\.judges\.3 are the same judge \(http http://x/v1 b\)"
    with pytest.raises(PsyrayError, match=said):
        make_panel([Named(id) for id in "abcd"], PanelSection(judges=twice), REVIEW)
    elsewhere = [*JUDGES, JUDGES[1].model_copy(update={"url": "http://y/v1"})]
    assert len(make_panel([Named(id) for id in "abcd"], PanelSection(judges=elsewhere), REVIEW).judges) == 4
    with pytest.raises(PsyrayError, match=r"strictest_on names safety; the rubric has right, safe"):
        make_panel([Named("a"), Named("b")], panel(strictest_on=["safety"]), REVIEW)
    ids = {make_panel([Named("a"), Named("b")], panel(rule=rule), REVIEW).id for rule in ("mean", "median")}
    assert len(ids) == 2
