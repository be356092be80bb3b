"""Alternatives sorted by their first letters match where they matched in a row."""

from __future__ import annotations

import json
import re

import pytest

from psyray import crisis
from psyray.alternatives import by_first_letter
from psyray.crisis import FILES, KINDS, read_rule

LINES = [
    "cut|(?:slit|slash)es",
    "(?:my )?own",
    r"\bi(?:'m| am) here",
    "(?<!not )here",
    "(?:a|an|the|his|her|their|our|your) gun",
    r"\w+s away",
    "[bc]at",
    "(?=x)xy?z",
    "(?:un){0,1}safe",
    "ü?ber|öde",
    "(?:(?:very|so) ){0,2}bad",
]


@pytest.mark.parametrize(
    "text",
    [
        *("cut", "slits", "slashes", "own", "my own", "i am here", "i'm here", "not here", "here", "your gun", "gun"),
        *("runs away", "bat", "cat", "rat", "xz", "xyz", "safe", "unsafe", "über", "öde", "so bad", "bad", "", "?"),
    ],
)
def test_the_same_texts_match(text: str) -> None:
    row, sorted_ = re.compile(rf"(?:{'|'.join(LINES)})"), re.compile(by_first_letter(LINES))
    assert [bool(row.match(text, at)) for at in range(len(text))] == [
        bool(sorted_.match(text, at)) for at in range(len(text))
    ]


def test_every_phrase_is_found_in_the_speeches_that_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A letter that a line may begin with and that is not seen would lose its matches without a sign."""
    speeches = (FILES[0].parent / "crisis_speeches_strangers.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in speeches]
    sorted_ = read_rule(FILES[0])
    monkeypatch.setattr(crisis, "by_first_letter", lambda lines: f"(?:{'|'.join(lines)})")
    row = read_rule(FILES[0])
    assert [row.reading(text.lower()) for text in texts] == [sorted_.reading(text.lower()) for text in texts]
    words = [row.reading(text.lower()) for text in texts]
    for kind in KINDS:
        found = [bool(row.phrases[kind].search(text)) for text in words]
        assert any(found) and found == [bool(sorted_.phrases[kind].search(text)) for text in words]
