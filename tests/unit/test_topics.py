"""The list of topics, the question, and the strict reading of an answer."""

import json
import re

import pytest

from psyray.ceiling import Ceiling
from psyray.config import load_config
from psyray.data.speeches import SHIPPED
from psyray.data.topics import TOPICS, check_share, choice, summary, topic_judge, topic_row, topics
from psyray.errors import PsyrayError
from psyray.rubric import UnusableAnswer
from psyray.run import Folder

CHOICE = choice()


def test_a_budget_that_would_bound_nothing_is_refused():
    with pytest.raises(PsyrayError, match=r"topics\.budget bounds nothing"):
        topic_judge(load_config(None, ["topics={engine: vllm, model: m, budget: 5}"]))


def test_the_list_holds_the_topics_of_the_shipped_speeches():
    shipped = {(row["subtopic"], row["topic"]) for row in map(json.loads, SHIPPED.read_text().splitlines())}
    assert set(topics().items()) == shipped and len(topics()) == 42 and len(set(topics().values())) == 8


def test_the_question_holds_the_clients_words_as_they_are_and_every_topic():
    words = [
        {"role": "user", "content": "I {topics} and {conversation} {}"},
        {"role": "assistant", "content": "HIDDEN"},
    ]
    (asked,) = CHOICE.question(words, "")
    assert "I {topics} and {conversation} {}" in asked["content"] and "HIDDEN" not in asked["content"]
    assert all(f"- {name}\n" in asked["content"] for name in topics())


@pytest.mark.parametrize("name", topics())
def test_every_topic_is_read_and_allowed(name):
    place = CHOICE.parse(f' "{name.title()}". ')
    row = topic_row(
        {"key": "s", "ratings": json.dumps(place), "error": "", "raw_text": name, "attempts": 1}, "me", topics()
    )
    assert (row["subtopic"], row["topic"], row["status"]) == (name, topics()[name], "ok")
    assert re.fullmatch(CHOICE.regex(), name)


@pytest.mark.parametrize("text", ["", "sleep or panic", "It is about sleep", "mood", "sleeping", "17"])
def test_anything_else_is_invalid_and_never_guessed(text):
    with pytest.raises(UnusableAnswer) as caught:
        CHOICE.parse(text)
    assert not text or text not in str(caught.value)
    row = topic_row({"key": "s", "ratings": "", "error": "no topic", "raw_text": text, "attempts": 3}, "me", topics())
    assert row["topic"] is None and row["subtopic"] is None and row["status"] == "invalid" and row["raw_text"] == text


def test_invalid_answers_are_counted_and_too_many_stop_the_stage(tmp_path):
    parts = Folder(tmp_path).parts(TOPICS, "speech_id")
    parts.append([{"speech_id": f"c{n}", "topic": "grief", "by": "column", "status": "ok"} for n in range(8)])
    parts.append([{"speech_id": "a", "topic": "mood", "subtopic": "numbness", "by": "m", "status": "ok"}])
    parts.append([{"speech_id": "b", "by": "m", "status": "invalid", "error": "no name"}])
    assert summary(parts) == {"column": 8, "engine": 1, "invalid": 1, "topics": {"grief": 8, "mood": 1}}
    check_share(parts, Ceiling(0.4, "x"))
    parts.append([{"speech_id": "c", "by": "m", "status": "invalid", "error": "no name"}])
    with pytest.raises(PsyrayError, match=r"topics: 2 of 3 answers are invalid .*no name.*They are in .*aside-"):
        check_share(parts, Ceiling(0.4, "x"))
    assert parts.ids == {"a", *(f"c{n}" for n in range(8))}


def test_the_offline_judge_knows_no_topics():
    assert topic_judge(load_config(None)) is None
    with pytest.raises(PsyrayError, match="knows no topics"):
        topic_judge(load_config(None, ["topics.engine=rule"]))


def test_topics_of_another_field_are_asked_for_and_read(tmp_path):
    path = tmp_path / "law.yaml"
    path.write_text("housing: [rent, deposit]\nwork: [notice, Art. 5]\n")
    judge = topic_judge(load_config(None, ["topics={engine: http, url: http://h/v1, model: m}", f"topics.file={path}"]))
    (asked,) = judge.rubric.question([{"role": "user", "content": "When is it paid back?"}], "")
    assert (
        asked["content"].startswith("Here is what somebody said.")
        and "- deposit\n- notice\n- Art. 5\n" in asked["content"]
    )
    assert "counsel" not in asked["content"] and "- sleep\n" not in asked["content"]
    assert judge.rubric.parse("Art. 5.") == {"topic": 3.0} and re.fullmatch(judge.rubric.regex(), "deposit")
    result = {"key": "s", "ratings": '{"topic": 1}', "error": "", "raw_text": "deposit", "attempts": 1}
    assert topic_row(result, "me", judge.rubric.coarse)["topic"] == "housing"


@pytest.mark.parametrize("text", [None, "[a, b]", "a: 1", "a: [b]", "a: [b, c]\nd: [B]", "a: [b"])
def test_a_file_that_lists_no_topics_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "law.yaml").write_text(text)
    with pytest.raises(PsyrayError, match=r"topics\.file: .*law\.yaml"):
        topics(str(tmp_path / "law.yaml"))
