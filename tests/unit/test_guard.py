"""What a client in a crisis is answered: the file of replies, the locale, and OpenAI's format."""

import asyncio
import json
from pathlib import Path

import pytest

from psyray.errors import PsyrayError
from serve.guard import Replies, crisis_hits, read_replies, safe_reply

OWN = Replies({"default": "Call someone.", "en-gb": "Call 116 123.", "de": "Rufen Sie an."})


def test_the_shipped_replies_name_people_and_say_what_is_talking():
    replies = read_replies(None)
    assert {"default", "en-us", "en-gb", "de"} <= set(replies.texts)
    assert all("program" in text.lower() and len(text) > 200 for text in replies.texts.values())
    assert "988" in replies.for_client("en-US") and "116 123" in replies.for_client("en-GB,en;q=0.9")
    assert replies.for_client("") == replies.for_client("xx") == replies.texts["default"]


def test_the_clients_words_are_read_across_parts_and_messages_and_nobody_elses():
    parts = [{"type": "text", "text": "I want"}, {"type": "text", "text": "to"}]
    client = [{"role": "user", "content": parts}, {"role": "user", "content": "die"}]
    assert crisis_hits(client) == [("self-harm", "en")] and crisis_hits(client[:1]) == []
    own = {"role": "system", "content": "If the client wants to kill himself, name a crisis line."}
    assert crisis_hits([own, own | {"role": "developer"}, {"role": "user", "content": "Hello."}]) == []


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("en-GB", "Call 116 123."),
        ("EN-gb;q=0.3, de-AT;q=0.8", "Rufen Sie an."),
        ("fr, en-GB;q=0.1", "Call 116 123."),
        ("en", "Call someone."),
        ("de;q=0, fr", "Call someone."),
        ("*", "Call someone."),
        (";;q=,,q=x;q=-1", "Call someone."),
    ],
)
def test_the_most_wanted_locale_that_is_there_answers(header: str, found: str):
    assert OWN.for_client(header) == found


@pytest.mark.parametrize(
    ("header", "spoken", "found"),
    [
        ("", ["de"], "Rufen Sie an."),
        ("*", ["de"], "Rufen Sie an."),
        ("en-GB,en;q=0.9", ["de"], "Rufen Sie an."),
        ("fr", ["fr"], "Call someone."),
        ("", ["en"], "Call someone."),
        ("de-DE,en-GB;q=0.1", ["en"], "Call 116 123."),
        ("de-DE", ["en"], "Rufen Sie an."),  # no text for English alone
        ("en-GB,de;q=0.5", ["de", "en"], "Call 116 123."),
    ],
)
def test_the_language_of_the_words_comes_before_the_headers(header: str, spoken: list[str], found: str):
    assert OWN.for_client(header, spoken) == found


def test_german_words_bring_the_german_reply():
    said = [{"role": "user", "content": "Ich will nicht mehr leben."}]
    assert crisis_hits(said) == [("self-harm", "de")]
    assert "TelefonSeelsorge" in read_replies(None).for_client("", [hit.language for hit in crisis_hits(said)])


def test_a_reply_is_a_completion_of_openais_format():
    whole = json.loads(safe_reply("Call someone.", "policy", stream=False).body)
    assert whole["object"] == "chat.completion" and whole["model"] == "policy"
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "Call someone."}

    async def read() -> list[str]:
        return [piece async for piece in safe_reply("Call someone.", "policy", stream=True).body_iterator]

    events = [event.removeprefix("data: ").strip() for event in asyncio.run(read())]
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]" and len({chunk["id"] for chunk in chunks}) == 1
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Call someone."
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "stop"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("en: hello", "has no text `default`"),
        ("default: ''", "something else than texts"),
        ("- default", "something else than texts"),
        ("default: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(tmp_path: Path, text: str, words: str):
    (tmp_path / "replies.yaml").write_text(text)
    with pytest.raises(PsyrayError, match=words):
        read_replies(tmp_path / "replies.yaml")
    with pytest.raises(PsyrayError, match="no file of replies at"):
        read_replies(tmp_path / "none.yaml")
