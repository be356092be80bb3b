"""Another field than counselling: the example holds, and no word of counselling reaches judge, model or reader."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_pairs import finished_run
from made_run import MadeRun

from psyray import report
from psyray.config import Config, load_config
from psyray.data.card import render
from psyray.data.clean import conversation
from psyray.data.export import export_run
from psyray.errors import PsyrayError
from psyray.pipeline import check_settings
from psyray.rubric import PairwiseRubric, load_rubric, side_by_side

ROOT = Path(__file__).parents[2]
COUNSELLING = re.compile(r"\w*(?:counsel|client|therap|empath|distress)\w*", re.IGNORECASE)


LAW = "configs/law-clinic/run.yaml"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Its paths start there."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def law() -> Config:
    return load_config(LAW)


def test_every_question_of_the_example_is_one(law):
    check_settings(law)
    (source,) = law.speeches.listed()
    rows = [conversation(json.loads(line)["messages"]) for line in Path(source.path).read_text().splitlines()]
    assert sum(row is not None and len(row[-1]["content"]) >= law.speeches.min_chars for row in rows) == len(rows) == 42
    assert max(len(row or []) for row in rows) == 5


def test_neither_judge_nor_model_is_told_of_counselling(law):
    rubric = load_rubric(law.rubric)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    asked = rubric.question(messages, "d") + PairwiseRubric.of(rubric).question(messages, side_by_side("d", "e"))
    told = [m["content"] for m in asked] + [r.system for r in (*law.responses.responders, law.policy)]
    assert "Visitor:\na\n\nAdviser:\nb\n" in told[0] and not COUNSELLING.search("\n".join(told))


def test_a_name_for_who_answers_changes_no_id_of_a_rubric_without_one(law):
    rubric, shipped = load_rubric(law.rubric), load_rubric("counselling")
    assert (shipped.id, shipped.pairwise_id) == ("ea01037e44905838", "cab8eda0ea350c7d")  # what old runs were made by
    plain = replace(rubric, answerer="assistant")
    assert plain.id != rubric.id and plain.pairwise_id != rubric.pairwise_id


@pytest.mark.parametrize(
    ("unsaid", "name"),
    [
        ("policy={}", "policy"),
        ("responses={}", "counsellor"),
        ("responses.responders=[{name: x, system: s}, {name: y}]", "y"),
    ],
)
def test_a_model_that_would_be_told_that_it_is_a_counsellor_is_named(unsaid, name):
    with pytest.raises(PsyrayError, match=rf"no `system` for (responses.responders: )?{name}: .* rubric law-clinic"):
        check_settings(load_config(LAW, [unsaid]))


@pytest.mark.parametrize("words", [["judge.engine=rule"], ["evaluate.second.engine=rule"]])
def test_the_judge_of_counselling_is_refused_before_anything_starts(words):
    with pytest.raises(
        PsyrayError, match=r"knows no correct, steps, limits, plain of the rubric law-clinic; set judge"
    ):
        check_settings(load_config(LAW, words))


def test_a_panel_stands_in_the_place_of_the_default_judge():
    check_settings(load_config(LAW, ["judge={}", "panel.judges=[{engine: vllm, model: a}, {engine: vllm, model: b}]"]))


def test_the_report_and_the_card_speak_of_no_field(tmp_path):
    MadeRun(tmp_path / "made").make()
    page = re.sub(r"<[^>]*>|rubric\s*counselling", "", report.page(tmp_path / "made"))
    assert set(COUNSELLING.findall(page)) == {"Empathy"}  # the made run's own principle
    finished_run(tmp_path / "runs/demo")
    known = export_run(tmp_path / "runs/demo", tmp_path / "out", rounds=True)
    other = known["rubric"] | {"name": "law-clinic", "speaker": "visitor", "principles": []}
    card = render(known | {"rubric": other, "responders": [], "oracle": "experts"})
    assert set(COUNSELLING.findall(card)) == {"PsychoCounsel"} and "the visitor's last words" in card
    assert "by `oracle.kind: experts`" in card and "but for the experts' in `rounds`" in card


@pytest.mark.parametrize("page", ["annotate", "compare", "page"])
def test_the_pages_call_whoever_asks_as_the_rubric_does(page):
    texts = [file.read_text() for file in (ROOT / "serve/assets").glob(f"{page}.[hj]*")]
    assert texts and set(COUNSELLING.findall("\n".join(texts))) <= {"distress"}
