"""The rubric as data, and the strict reading of a judge's answer."""

import json
import re
from functools import partial

import pytest
import yaml

from psyray.config import load_config
from psyray.engines.judges import soft_ratings
from psyray.errors import PsyrayError
from psyray.pipeline import keep_rubric
from psyray.rubric import PairwiseRubric, UnusableAnswer, load_rubric, side_by_side
from psyray.run import Run
from psyray.sections.data import ASSETS

RUBRIC = load_rubric("counselling")
GOOD = dict.fromkeys(RUBRIC.keys, 4)


def test_the_seven_principles_are_there_with_equal_weight():
    assert RUBRIC.keys == ["empathy", "relevance", "clarity", "safety", "exploration", "autonomy", "staging"]
    assert RUBRIC.score({key: i for i, key in enumerate(RUBRIC.keys, 1)}) == 4.0


@pytest.mark.parametrize(
    "text", [json.dumps(GOOD), f"Sure! {json.dumps(GOOD)} Done.", json.dumps(dict.fromkeys(GOOD, "4"))]
)
def test_ratings_are_read(text):
    assert RUBRIC.parse(text) == dict.fromkeys(RUBRIC.keys, 4.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON object"),
        ("I would give it 5 of 5", "no JSON object"),
        (json.dumps(GOOD)[:-5], "no JSON object"),
        ("{'empathy': 4}", "cannot be read"),
        (json.dumps({**GOOD, "safety": 0}), "outside 1 to 5"),
        (json.dumps({**GOOD, "safety": 6}), "outside 1 to 5"),
        (json.dumps({**GOOD, "safety": 10}), "outside 1 to 5"),
        (json.dumps({**GOOD, "safety": 10**400}), "outside 1 to 5"),
        (json.dumps({**GOOD, "safety": float("nan")}), "out of scale: safety is nan, outside 1 to 5"),
        (json.dumps({**GOOD, "safety": "what she said"}), "wrong schema: safety is a str, not a whole number"),
        (json.dumps({**GOOD, "safety": 4.5}), "not a whole number"),
        (json.dumps({**GOOD, "safety": "4.5"}), "not a whole number"),
        (json.dumps({**GOOD, "safety": True}), "not a whole number"),
        (json.dumps({**GOOD, "safety": None}), "not a whole number"),
        (json.dumps(dict.fromkeys(RUBRIC.keys[1:], 4)), "no rating for empathy"),
    ],
)
def test_an_answer_that_cannot_be_used_gives_a_reason_and_no_number(text, reason):
    with pytest.raises(UnusableAnswer, match=reason):
        RUBRIC.parse(text)


def test_guided_decoding_allows_just_what_can_be_read():
    exact = json.dumps(GOOD, separators=(",", ":"))
    assert re.fullmatch(RUBRIC.regex(), exact) and not re.fullmatch(RUBRIC.regex(), exact.replace("4", "6"))
    assert RUBRIC.parse(exact) == dict.fromkeys(RUBRIC.keys, 4.0)


def test_braces_in_a_clients_words_are_not_fields():
    question = RUBRIC.question([{"role": "user", "content": "I feel {response}."}], "You feel {low}.")
    assert "I feel {response}." in question[0]["content"] and "You feel {low}." in question[0]["content"]


def test_a_soft_score_is_the_expectation_over_the_digits():
    def token(text, *digits):
        return {str(i): {"decoded_token": t, "logprob": p} for i, (t, p) in enumerate(((text, 0.0), *digits)) if t}

    even = {"a": {"decoded_token": "2", "logprob": -1.0}, "b": {"decoded_token": "4", "logprob": -1.0}}
    answer = [token("{"), *[t for _ in RUBRIC.keys for t in (token('"key":'), even, token(","))], token("}")]
    assert all(abs(value - 3.0) < 1e-9 for value in soft_ratings(RUBRIC, answer).values())
    with pytest.raises(UnusableAnswer, match="6 rating digits for 7"):
        soft_ratings(RUBRIC, [even] * 6)


def test_another_fields_rubric_is_a_file(tmp_path):
    tree = yaml.safe_load((ASSETS / "rubrics/counselling.yaml").read_text())
    tree |= {"name": "code review", "scale": [0, 9], "speaker": "author"}
    tree["principles"] = {"correct": {"name": "Correctness", "weight": 3, "guidance": "Is it right?"},
                          "kind": {"name": "Kindness", "guidance": "Is it kind?"}}  # fmt: skip
    path = tmp_path / "review.yaml"
    path.write_text(yaml.safe_dump(tree))
    rubric = load_rubric(str(path))
    assert rubric.parse('{"correct": 9, "kind": 1}') == {"correct": 9.0, "kind": 1.0}
    assert rubric.score({"correct": 9.0, "kind": 1.0}) == 7.0
    assert rubric.question([{"role": "user", "content": "x"}], "y")[0]["content"].count("Author:") == 1
    assert rubric.id != RUBRIC.id


def test_a_run_keeps_the_rubric_that_it_asked_by_when_its_file_changes(tmp_path):
    tree, path = yaml.safe_load((ASSETS / "rubrics/counselling.yaml").read_text()), tmp_path / "own.yaml"
    config, run = load_config(None, [f"rubric={path}"]), Run(tmp_path)
    asked = []
    for change in ({}, {"pairwise_prompt": tree["pairwise_prompt"] + " Say one word."}, {"speaker": "caller"}):
        path.write_text(yaml.safe_dump(tree | change))
        asked.append(load_rubric(str(path)))
        keep_rubric(config, run, asked[-1])
    path.unlink()
    for rubric, rates in zip(asked, (asked[0], asked[0], asked[2]), strict=True):
        assert load_rubric(str(tmp_path / f"rubric-{rubric.pairwise_id}.yaml")) == rubric
        assert load_rubric(str(tmp_path / f"rubric-{rubric.id}.yaml")) == rates


@pytest.mark.parametrize("change", [{"scale": [1]}, {"principles": {}}, {"scale": [1, 12]}, {"prompt": None}])
def test_a_broken_rubric_is_named(tmp_path, change):
    tree = yaml.safe_load((ASSETS / "rubrics/counselling.yaml").read_text()) | change
    tree = {k: v for k, v in tree.items() if v is not None}
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(PsyrayError, match=r"broken\.yaml"):
        load_rubric(str(path))
    with pytest.raises(PsyrayError, match=r"neither one that ships .* nor a file at /.*/counseling"):
        load_rubric("counseling")


def test_two_responses_side_by_side_are_asked_and_read_by_the_same_rubric():
    pairwise = PairwiseRubric.of(RUBRIC)
    question = pairwise.question([{"role": "user", "content": "I feel {b}."}], side_by_side("first {a}", "second"))
    text = question[0]["content"]
    assert "I feel {b}." in text and "first {a}" in text and text.index("first") < text.index("second")
    assert [pairwise.parse(word)["preference"] for word in ("A", " B\n", "tie")] == [1.0, -1.0, 0.0]
    assert all(re.fullmatch(pairwise.regex(), word) for word in ("A", "B", "tie"))
    for word in ("a", "Tie", "A.", "A B", "", "Response A", "C"):
        with pytest.raises(UnusableAnswer, match="none of A, B, tie"):
            pairwise.parse(word)
        assert not re.fullmatch(pairwise.regex(), word)


def test_the_pairwise_prompt_changes_what_is_compared_and_not_what_was_rated(tmp_path):
    tree = yaml.safe_load((ASSETS / "rubrics/counselling.yaml").read_text())
    path, dump = tmp_path / "other.yaml", partial(yaml.safe_dump, sort_keys=False)
    path.write_text(dump(tree | {"pairwise_prompt": "{conversation} {a} or {b}?"}))
    other = load_rubric(str(path))
    assert other.id == RUBRIC.id and other.pairwise_id != RUBRIC.pairwise_id
    path.write_text(dump(tree | {"pairwise_prompt": "{a} or what?"}))
    with pytest.raises(PsyrayError, match=r"pairwise_prompt does not show \{conversation\}, \{b\}"):
        load_rubric(str(path))
    path.write_text(dump({k: v for k, v in tree.items() if k != "pairwise_prompt"}))
    with pytest.raises(PsyrayError, match="has no pairwise_prompt"):
        PairwiseRubric.of(load_rubric(str(path)))
