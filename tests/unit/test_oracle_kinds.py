"""Who answers: the kinds in the configuration, what a pair is asked for, and the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from made_oracles import pairs, people

from psyray import plan
from psyray.active.oracle_kinds import ORACLES, JudgeOracle, make_oracle
from psyray.active.oracles import pair_question, turned
from psyray.config import Config, load_config
from psyray.errors import PsyrayError
from psyray.sections.learning import OracleSection


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
