"""Whether a client's words speak of a crisis, and of which kind: a transparent phrase list, not a diagnosis.

A hit says that a person should look at the conversation; no hit says nothing. The lists, one for each language
(psyray/assets/crisis_phrases.yaml for English, crisis_phrases_german.yaml), cover plain words in three kinds
(`KINDS`): self-harm with suicide, abuse of the client or those around them, and danger to others. Every text is read by
every list. They read words, not meaning: hints, further languages and most slang go by unseen, and a sentence about
somebody else or the past counts as much as one about now. Where it must err it flags. How often: docs/crisis.md.

A phrase does not count where the words just before it deny it ("I have no thoughts of suicide", "I'm not suicidal") or
set it in a story or in the work of those who help ("in the novel she wants to die"). "Trying not to hurt myself" is no
denial and counts. Idioms ("die of embarrassment") are taken out first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_ASSETS = Path(__file__).parent / "assets"
KINDS = ("self-harm", "abuse", "danger to others")

_LOOK_BACK = 120  # characters before a phrase in which a denial of it may stand; the longest have some 80
# What keyboards put for an apostrophe (acute, grave, prime, modifier letters, quotation marks), and hyphens.
_STRAIGHT = dict.fromkeys(map(ord, "\u00b4`\u02b9\u02bb\u02bc\u02c8\u2018\u2019\u201b\u2032\u2035\uff40"), "'")
_STRAIGHT |= dict.fromkeys(map(ord, "\u2010\u2011"), "-") | dict.fromkeys(map(ord, "\u201c\u201d\u201e"), '"')
_UNSEEN = ("Cf", "Mn")  # soft hyphens, zero-width characters and the like; marks drawn onto a letter
_MARKS = re.compile(r"[-*_~\"']+")
_PAUSES = re.compile(r"\.{2,}|--+|[\u2013\u2014]|(?<=\s)-(?=\s)")
_PART = re.compile(r"<(\w+)>")
_LONG = re.compile(r"([^\W\d_])\1{2,}")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


class Hit(NamedTuple):
    """A kind of crisis that is spoken of, and the language of the phrase."""

    kind: str
    language: str


@dataclass(frozen=True)
class Rule:
    """One language's words, from a file like psyray/assets/crisis_phrases.yaml."""

    language: str  # as in a locale
    phrases: Mapping[str, re.Pattern[str]]  # by kind
    harmless: re.Pattern[str]
    clause: re.Pattern[str]
    denied: re.Pattern[str]
    # The wish or the act may be the phrase's own first word, so that the denial stands right before it.
    wished: re.Pattern[str]
    denied_wish: re.Pattern[str]
    setting: re.Pattern[str]
    own: re.Pattern[str]  # the client's own words for themselves: no story
    spellings: Mapping[str, str]
    letters: Mapping[int, str]  # such as umlauts, and how they are spelt out

    def holds(self, words: str, kind: str) -> bool:
        """Whether the plain words hold a phrase of the kind that nothing denies."""
        return any(not _denied(self, hit) for hit in self.phrases[kind].finditer(words))

    def reading(self, plain: str) -> str:
        """The plain text with usual short forms and misspellings spelt out, without the idioms."""
        written = _LONG.sub(r"\1", plain.translate(self.letters))
        spelt = _WORD.sub(lambda word: self.spellings.get(word.group(), word.group()), written)
        return self.harmless.sub(";", spelt)


def read_rule(file: Path) -> Rule:
    """The rule of a file; its lines are joined as alternatives, and parts are put in for their names."""
    tree = yaml.safe_load(file.read_text())
    parts = {name: _either(block) for name, block in tree["parts"].items()}

    def pattern(block: str, form: str = "{}") -> re.Pattern[str]:
        return re.compile(_filled(form.format(_either(block)), parts))

    gap = _filled(f"(?: (?!{_either(tree['own'] + tree['here'])}\\b)[\\w'-]+)", parts) + "{{0,10}}"
    return Rule(
        language=tree["language"],
        phrases={kind: pattern(tree["phrases"].get(kind, "(?!)"), r"(?<!\w)(?=\w){}") for kind in KINDS},
        harmless=pattern(tree["harmless"], r"(?<!\w)(?=\w){}"),
        clause=pattern(tree["clause"], r"[.!?;:,()]|\b{}\b"),
        denied=pattern(tree["denials"], r"{}\s*$"),
        wished=pattern("<wish>\n<act>", r"{}\b"),
        denied_wish=pattern(tree["denied_wish"], r"{}\s*$"),
        setting=pattern(tree["settings"], rf"\b{{}}{gap}\s*$"),
        own=pattern(tree["own"], r"\b{}\b"),
        spellings=dict(_slips(tree["typos"].split())) | tree["spellings"],
        letters=str.maketrans(tree.get("letters", {})),
    )


def _either(block: str) -> str:
    lines = (line.strip() for line in block.splitlines())
    return f"(?:{'|'.join(line for line in lines if line and not line.startswith('#'))})"


def _filled(pattern: str, parts: Mapping[str, str]) -> str:
    """The pattern with each <name> replaced by that part, and the parts within parts."""
    while _PART.search(pattern):
        pattern = _PART.sub(lambda name: parts[name.group(1)], pattern)
    return pattern


def _slips(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each word mistyped by one inner letter left out or doubled, or by two letters swapped, with the word."""
    for word in words:
        for place in range(1, len(word) - 1):
            yield word[:place] + word[place + 1 :], word
            yield word[: place + 1] + word[place:], word
            yield word[:place] + word[place + 1] + word[place] + word[place + 2 :], word


FILES = (_ASSETS / "crisis_phrases.yaml", _ASSETS / "crisis_phrases_german.yaml")
RULES = tuple(map(read_rule, FILES))


def flag(text: str) -> bool:
    """Whether the text holds a phrase that speaks of a crisis of any kind."""
    return bool(kinds(text))


def kinds(*texts: str) -> list[str]:
    """The kinds of crisis that the texts hold a phrase of, in the order of KINDS."""
    return list(dict.fromkeys(hit.kind for hit in hits(*texts)))


def hits(*texts: str) -> list[Hit]:
    """Of which kinds, and in which languages, the texts hold a phrase, in the order of KINDS."""
    plain = [reading for text in texts for reading in _readings(text)]
    read = [(rule, {rule.reading(text) for text in plain}) for rule in RULES]
    return [
        Hit(kind, rule.language)
        for kind in KINDS
        for rule, readings in read
        if any(rule.holds(words, kind) for words in readings)
    ]


def identity() -> list[Any]:
    """All that the rule reads by, for the fingerprint of what it was used on."""
    return [yaml.safe_load(file.read_text()) for file in FILES]


def spoken(messages: Iterable[tuple[str, str]]) -> list[str]:
    """The client's texts of (role, text), and joined those that no answer parts: one sentence may stand in several."""
    heard = ((role, text) for role, text in messages if role in ("user", "assistant") and text.strip())
    runs = [[text for _, text in run] for role, run in groupby(heard, lambda said: said[0]) if role == "user"]
    return [text for run in runs for text in (*run, *([" ".join(run)] if len(run) > 1 else ()))]


def _readings(text: str) -> set[str]:
    """The plain text as it stands, and without its pauses: "I want to ... die" is one sentence."""
    plain = _plain(text)
    return {plain, " ".join(_PAUSES.sub(" ", plain).split())}


def _plain(text: str) -> str:
    """Lower case, straight apostrophes, single spaces; without emphasis and without what nobody sees."""
    folded = text.translate(_STRAIGHT)  # first: NFKC makes a space and an accent of an acute accent
    if not folded.isascii():
        folded = unicodedata.normalize("NFKC", folded).translate(_STRAIGHT)
        folded = "".join(letter for letter in folded if unicodedata.category(letter) not in _UNSEEN)
    return " ".join(_MARKS.sub(_spaced, folded.casefold()).split())


def _spaced(mark: re.Match[str]) -> str:
    """Emphasis and hyphens as a space; an apostrophe in a word, a dash and what stands alone as they are."""
    words, marks = mark.string, mark.group()
    before = mark.start() > 0 and words[mark.start() - 1].isalnum()
    after = mark.end() < len(words) and words[mark.end()].isalnum()
    kept = "--" in marks or (marks == "'" and before and after) or not (before or after)
    return marks if kept else " "


def _denied(rule: Rule, hit: re.Match[str]) -> bool:
    """Whether the end of the clause before the phrase denies it, or sets it in a story."""
    # Not all that stands before: a text of many phrases would be read once for each of them.
    words, end = hit.string, hit.start()
    start = max(0, end - _LOOK_BACK)
    start = max((mark.end() for mark in rule.clause.finditer(words, start, end)), default=start)
    if rule.denied.search(words, start, end):
        return True
    if rule.wished.match(hit.group()) and rule.denied_wish.search(words, start, end):
        return True
    return not rule.own.search(hit.group()) and bool(rule.setting.search(words, start, end))
