"""The probe: its files, what is read, and figures against cases worked out by hand."""

import json
import math
from pathlib import Path

import pytest

from psyray.config import load_config
from psyray.errors import PsyrayError
from psyray.evaluate.likelihood import Passage, batches, tokens
from psyray.evaluate.probe import answer_passages, figures, known_passages, load_probe
from psyray.pipeline import check_settings


def row(kind: str, of: str, policy: list[float], start: list[float], characters: int = 4, right: bool = False) -> dict:
    return {"kind": kind, "of": of, "policy": policy, "start": start, "characters": characters, "right": right}


def test_what_ships_is_whole():
    probe = load_probe("general")
    assert len(probe.texts) == len(set(probe.texts)) == 30 and len(probe.questions) == 40
    assert len({question for question, _, _ in probe.questions}) == 40
    places = [answer for _, options, answer in probe.questions if len(options) == 4]
    assert {place: places.count(place) for place in range(4)} == dict.fromkeys(range(4), 10)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"question": "A b", "options": ["c"], "answer": 0}', "two different options"),
        ('{"question": "A b", "options": ["c", "d"], "answer": 2}', "two different options"),
        ('{"question": "A b", "options": ["c", "c"], "answer": 0}', "two different options"),
        ('{"question": " ", "options": ["c", "d"], "answer": 0}', "an empty text"),
        ('{"question": "A b", "answer": 0}', "options"),
        ("no json", "line 2"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, wrong):
    (tmp_path / "texts.jsonl").write_text('{"text": "It rained."}\n')
    good = json.dumps({"question": "A b", "options": ["c", "d"], "answer": 1})
    (tmp_path / "questions.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(PsyrayError, match=f"questions.jsonl, line 2.*{wrong}|{wrong}"):
        load_probe(str(tmp_path))
    (tmp_path / "questions.jsonl").write_text(f"{good}\n")
    assert load_probe(str(tmp_path)).questions == (("A b", ("c", "d"), 1),)
    assert load_probe(str(tmp_path)).id != load_probe("general").id


def test_a_missing_probe_and_a_second_judge_that_labels_are_named_before_anything_starts(tmp_path):
    with pytest.raises(PsyrayError, match=r"no probe 'genral'.*\(general\)"):
        check_settings(load_config(None, ["evaluate.probe=genral"]))
    with pytest.raises(PsyrayError, match=r"texts.jsonl is missing"):
        check_settings(load_config(None, [f"evaluate.probe={tmp_path}"]))
    with pytest.raises(PsyrayError, match=r"evaluate.second is the judge that labels"):
        check_settings(load_config(None, ["evaluate.second.engine=rule"]))
    check_settings(load_config(None, ["evaluate.second.engine=vllm", "evaluate.second.model=m"]))
    with pytest.raises(PsyrayError, match="second_decides needs a judge"):
        load_config(None, ["evaluate.second_decides=true"])
    with pytest.raises(PsyrayError, match=r"max_kl needs evaluate.probe"):
        load_config(None, ["evaluate.max_kl=0.5", "evaluate.probe="])


VLLM, HTTP = "{engine: vllm, model: m", "{engine: http, url: http://h/v1, model: m"


@pytest.mark.parametrize(
    ("labels", "second"),
    [
        (f"judge={VLLM}}}", f"{VLLM}, mode: soft}}"),
        (f"judge={VLLM}}}", f"{VLLM}, max_tokens: 64, form: pairwise}}"),
        (f"judge={HTTP}}}", f"{HTTP}, max_tokens: 64}}"),
        (f"judge={HTTP}}}", f"{HTTP.replace('/v1', '/v1/')}, api_key_env: OTHER}}"),
        (f"panel.judges=[{{engine: rule}}, {HTTP}}}]", f"{HTTP}, form: pairwise}}"),
    ],
)
def test_the_judge_that_labels_is_known_again_however_it_is_asked(labels, second):
    with pytest.raises(
        PsyrayError, match=r"evaluate.second is the judge that labels \((vllm m|http http://h/v1/? m)\)"
    ):
        check_settings(load_config(None, [labels, f"evaluate.second={second}"]))
    for other in (second.replace("model: m", "model: other"), "{engine: vllm, model: x}"):
        check_settings(load_config(None, [labels, f"evaluate.second={other}"]))


def test_a_model_in_a_folder_is_the_same_by_whatever_name_it_goes(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    named = [f"{{engine: vllm, model: {tmp_path}/{name}}}" for name in ("model", "link")]
    with pytest.raises(PsyrayError, match=r"evaluate\.second is the judge that labels"):
        check_settings(load_config(None, [f"judge={named[0]}", f"evaluate.second={named[1]}"]))


def test_the_example_in_the_docs_is_a_valid_configuration(tmp_path):
    page = (Path(__file__).parents[2] / "docs/loop.md").read_text()
    (tmp_path / "loop.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    config = load_config(tmp_path / "loop.yaml")
    check_settings(config)
    assert config.evaluate.second and config.evaluate.second.engine == "vllm" and config.evaluate.max_kl == 0.5


def test_perplexity_is_over_all_tokens_and_its_rise_over_the_start():
    half, quarter = math.log(0.5), math.log(0.25)
    rows = [row("text", "t1", [quarter, quarter], [half, half]), row("text", "t2", [half], [half])]
    found = figures(rows)
    assert found["perplexity"] == pytest.approx(4 ** (2 / 3) * 2 ** (1 / 3)) and found[
        "start_perplexity"
    ] == pytest.approx(2)
    assert found["perplexity_rise"] == pytest.approx(2 ** (2 / 3) - 1) and found["texts"] == 2
    assert found["perplexity_rise_low"] <= found["perplexity_rise"] <= found["perplexity_rise_high"]
    assert "accuracy" not in found and "kl" not in found


def test_the_likeliest_option_by_character_answers_and_equals_share():
    question = [row("option", "q1", [-4.0], [-4.0], 4, right=True), row("option", "q1", [-6.0], [-3.0], 10)]
    tied = [row("option", "q2", [-1.0], [-2.0], 1, right=True), row("option", "q2", [-1.0], [-1.0], 1)]
    broken = [row("option", "q3", [math.nan], [-1.0], 1, right=True), row("option", "q3", [-1.0], [-2.0], 1)]
    found = figures([*question, *tied, *broken])
    # q1: -1 a character against -0.6 and -0.3; q2: a draw, then the wrong one; q3: no number, then the right one
    assert found["accuracy"] == pytest.approx((0 + 0.5 + 0) / 3) and found["start_accuracy"] == pytest.approx(1 / 3)
    assert found["capability_drop"] == pytest.approx(1 / 3 - 0.5 / 3) and found["questions"] == 3


def test_distance_is_schulmans_third_estimator_and_nothing_for_the_start_itself():
    p, start = [math.log(0.5), math.log(0.8)], [math.log(0.25), math.log(0.8)]
    found = figures([row("answer", "s1", p, start)])
    assert found["kl"] == pytest.approx((0.5 - 1 - math.log(0.5)) / 2) and found["log_ratio"] == pytest.approx(
        math.log(2) / 2
    )
    turned = figures([row("answer", "s1", start, p), row("answer", "s2", p, p), row("answer", "s3", [], [])])
    assert (
        turned["kl"] == pytest.approx((2 - 1 - math.log(2)) / 4) and turned["log_ratio"] < 0 and turned["answers"] == 2
    )
    same = figures([row("answer", "s1", p, p)])
    assert (same["kl"], same["log_ratio"], same["kl_low"]) == (0, 0, 0)


def test_the_same_speeches_are_read_every_round_and_unusable_answers_are_not():
    config = load_config(None, ["evaluate.probe_answers=3", "policy.system=Be kind."])

    def samples(number: int) -> list[dict]:
        chat = [{"role": "user", "content": "Hi."}]
        usual = {"messages": chat, "split": "test", "status": "ok", "text": f"said in {number}"}
        rows = [{"response_id": f"{number}-{i}", "speech_id": f"s{i}", **usual} for i in range(8)]
        rows[2] |= {"status": "failed", "text": None}
        return [*rows, rows[0] | {"response_id": "t", "speech_id": "x", "split": "train"}]

    first, later = (answer_passages(samples(n), config) for n in (1, 2))
    assert [r["of"] for _, r in first.values()] == [r["of"] for _, r in later.values()] and len(first) == 3
    assert not set(first) & set(later)
    passage, _ = next(iter(first.values()))
    assert passage.before[0] == {"role": "system", "content": "Be kind."} and passage.text == "said in 1"
    read = known_passages(load_probe("general"))
    assert len(read) == 30 + 4 * 40 and sum(bool(r["right"]) for _, r in read.values()) == 40
    assert all(p.text.startswith(" ") for p, r in read.values() if r["kind"] == "option")


class Words:
    """A stand-in tokeniser: a token a word, and one that begins each text."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": [1] * add_special_tokens + [sum(map(ord, word)) for word in text.split()]}

    def apply_chat_template(self, chat: list[dict], **_: object) -> list[int]:
        return [7, *(i for m in chat for i in self(m["content"], False)["input_ids"])]


def test_only_the_text_counts_and_what_is_too_long_loses_its_beginning():
    ids, first = tokens(Words(), Passage("k", "The sky is", " blue today"), 100, {})
    assert (len(ids), first) == (6, 4)
    assert tokens(Words(), Passage("k", "", "It rained all day"), 100, {})[1] == 1
    chat = [{"role": "user", "content": "one two three four"}]
    ids, first = tokens(Words(), Passage("k", chat, "five six"), 100, {})
    assert (len(ids), first) == (7, 5)
    assert tokens(Words(), Passage("k", chat, "five six"), 4, {}) == (ids[3:], 2)
    assert tokens(Words(), Passage("k", chat, "five six"), 2, {})[1] == 1


def test_passages_of_like_length_share_a_pass_that_fits():
    found = batches({"a": 10, "b": 1500, "c": 600, "d": 20, "e": 1000, "f": 5000})
    assert found == [["a", "d", "c"], ["e"], ["b"], ["f"]]
