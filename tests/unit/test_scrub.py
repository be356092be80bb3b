"""What is taken out of a client's words, and what must stay."""

import re
import sys
from types import SimpleNamespace

import pytest

from psyray.config import load_config
from psyray.data.scrub import scrub, scrubber
from psyray.errors import PsyrayError

TAKEN = [
    ("Write to jane.doe+x@mail.example.co.uk, please", "Write to [email], please"),
    ("see https://example.org/a?b=1. Then", "see [link]. Then"),
    ("I read it on www.example.com, honestly", "I read it on [link], honestly"),
    ("my blog is sadcat.example.com/me", "my blog is [link]"),
    ("Call 555-1234 or (020) 7946 0958", "Call [phone] or [phone]"),
    ("It is +44 20 7946 0958.", "It is [phone]."),
    ("my number: 07700900123", "my number: [phone]"),
    ("text 212-555-0187 now", "text [phone] now"),
    ("My name is Sarah and I am 24.", "My name is [name] and I am 24."),
    ("Hi, I'm Anna. Anna never sleeps.", "Hi, I'm [name]. [name] never sleeps."),
    ("Everyone calls me Tom", "Everyone calls me [name]"),
    ("my husband John left. I miss John's voice", "my husband [name] left. I miss [name]'s voice"),
    ("My best friend, Mary-Ann, moved", "My best friend, [name], moved"),
    ("My ex-boyfriend Mike Smith texts me. Smith!", "My ex-boyfriend [name] texts me. [name]!"),
    ("my mother-in-law Ruth hates me", "my mother-in-law [name] hates me"),
    ("a girl named Jess, and a guy called Omar", "a girl named [name], and a guy called [name]"),
    ("his name is Paul", "his name is [name]"),
    ("My son Will cries. Will it end?", "My son [name] cries. Will it end?"),
    ("What should I do?\nThank you, Maria", "What should I do?\nThank you, [name]"),
    ("my little sister (Lucy) knows", "my little sister ([name]) knows"),
]

LEFT = [
    "My husband says I am cold. He left in March.",
    "My mother. She never calls.",
    "My Husband Is Away And I Cry",
    "I'm Catholic and my boyfriend Is not",
    "I am American. Hi, I'm American.",
    "I'm Sad. I'm Lost.",
    "my friend I trusted",
    "my dad Always shouts",
    "my brother and I",
    "I called Mum and told her",
    "a place called Home? a man called him",
    "In London I met Peter Pan on stage",
    "Thank you. God bless",
    "from 2015-2019 I was ill, on 12-31-2015 I stopped",
    "I weigh 120 lbs, I was 5 10 and 3.5 kg, 1,000,000 times",
    "I paid $1200 300 times, 10-15 pills, 24/7, at 10:30",
    "I have 100 200 problems and 3 4 5 6 kids",
    "e.g. this, i.e. that, etc.and so on...then",
    "My partner Christmas shops in July",
    "",
]


@pytest.mark.parametrize(("text", "expected"), TAKEN)
def test_personal_details_are_replaced_by_their_kind(text, expected):
    found, counts = scrub(text)
    assert found == expected
    assert counts.total() == sum(expected.count(f"[{kind}]") for kind in ("email", "link", "phone", "name"))


@pytest.mark.parametrize("text", LEFT)
def test_other_words_stay(text):
    assert scrub(text) == (text, {})


def test_scrubbing_twice_changes_nothing_more():
    for text, expected in TAKEN:
        assert scrub(expected) == (expected, {}), text


def test_off_leaves_all_and_presidio_says_what_to_install(monkeypatch):
    assert scrubber("off")("I'm called Tom, t@x.org") == ("I'm called Tom, t@x.org", {})
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(PsyrayError, match=r'pip install "psyray\[scrub\]"'):
        scrubber("presidio")("text")


class StandInAnalyzer:
    """Sees the given words as names, wherever they stand, as Presidio's analyzer would say it."""

    def __init__(self, *words):
        self.words = words

    def analyze(self, text, language, entities):
        assert (language, entities) == ("en", ["PERSON"])
        return [SimpleNamespace(start=m.start(), end=m.end()) for w in self.words for m in re.finditer(w, text)]


def test_presidio_adds_names_to_what_the_rules_find(monkeypatch):
    analyzer = StandInAnalyzer("Ingrid", "Ole Smith", "Smith", r"name\]")
    monkeypatch.setattr("psyray.data.scrub._analyzer", lambda model: {"some_model": analyzer}[model])
    text, counts = scrubber("presidio:some_model")("I'm called Tom. Ingrid and Ole Smith wrote to a.b@c.org; Tom read.")
    assert text == "I'm called [name]. [name] and [name] wrote to [email]; [name] read."
    assert counts == {"name": 4, "email": 1}


@pytest.mark.parametrize("wrong", ["presidio:", "spacy", "presidio:a b"])
def test_an_unknown_scrubber_is_refused_with_the_settings(wrong):
    with pytest.raises(PsyrayError, match=r"speeches\.scrub"):
        load_config(None, [f"speeches.scrub={wrong}"])
