"""The offline judge: seven ratings of a counselling reply from counted, named features.

What it is: a deterministic scorer of surface marks. It splits a reply into sentences, calls each one a
reflection, a question, advice, talk about the counsellor or a plain statement, counts a few dozen marks as
shares or saturating counts in [0, 1], and adds them up by the signed table below. `explain` gives every
rating back as that sum. It needs no model, no network and a few milliseconds; it exists so that the whole
loop runs and can be tested on a laptop.

What it is not: it does not understand either text, it knows English only, it sees form (is this a
reflection, does it take up the client's words?) and not truth or wisdom, and it is no safety filter. A
reply can be written that pleases it and helps nobody; `docs/offline-judge.md` says how often simple
attempts do. Do not use its ratings as evidence about a model's counselling; use them to check that a
pipeline moves a model towards what its judge asks for.

The signs and the principles that a feature feeds are set by hand; the magnitudes are fitted by
`benchmarks/judge_agreement.py --fit` into `assets/rule_judge.json`. Its `--words` counts
`assets/rule_words.json`; `assets/rule_lexicon.json` is written by hand.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise
from typing import Any, NamedTuple

KEYS = ("empathy", "relevance", "clarity", "safety", "exploration", "autonomy", "staging")
FEATURES_VERSION = "1"


class Effect(NamedTuple):
    """How one feature acts: its sign, the magnitude before fitting, and the principles that share it."""

    sign: int
    prior: float
    feeds: tuple[str, ...]


ALL = KEYS
TABLE: dict[str, Effect] = {
    # what a counselling reply is made of, as shares of its words
    "reflection": Effect(+1, 1.5, ("empathy", "relevance", "exploration", "autonomy", "staging")),
    "loose_reflection": Effect(+1, 0.3, ("empathy", "relevance", "exploration")),
    "advice": Effect(-1, 1.2, ("empathy", "exploration", "autonomy", "staging")),
    "unasked_advice": Effect(-1, 0.6, ("autonomy", "staging")),
    "closed_question": Effect(-1, 0.8, ("empathy", "exploration", "autonomy")),
    "self_talk": Effect(-1, 0.9, ("empathy", "relevance", "exploration", "autonomy", "staging")),
    "lecture": Effect(-1, 0.7, ("empathy", "exploration", "autonomy", "staging")),
    # how far a reflection goes: saturating, so that a third sentence of the same earns nothing
    "substance": Effect(+1, 1.5, ("empathy", "relevance", "clarity", "exploration", "staging")),
    "beyond_words": Effect(+1, 1.0, ("empathy", "exploration", "staging")),
    "feeling_named": Effect(+1, 0.6, ("empathy", "exploration")),
    "two_sides": Effect(+1, 0.6, ("exploration", "staging")),
    "wish_named": Effect(+1, 0.6, ("autonomy", "staging")),
    "strength_named": Effect(+1, 0.6, ("empathy", "autonomy")),
    "tentative": Effect(+1, 0.3, ("autonomy", "safety")),
    "exploring_question": Effect(+1, 0.6, ("exploration", "autonomy", "staging")),
    "many_questions": Effect(-1, 1.0, ("clarity", "exploration")),
    # is it about this client
    "client_words": Effect(+1, 1.0, ("empathy", "relevance")),
    "off_topic": Effect(-1, 1.5, ("empathy", "relevance", "exploration", "autonomy", "staging")),
    "far_afield": Effect(-1, 2.0, ("relevance", "clarity", "empathy", "exploration")),
    "copied": Effect(-1, 1.5, ("empathy", "relevance", "clarity", "exploration")),
    # manners
    "command": Effect(-1, 1.0, ("autonomy", "safety")),
    "blame": Effect(-1, 1.5, ("empathy", "safety", "exploration", "autonomy", "staging")),
    "dismissal": Effect(-1, 1.5, ("empathy", "safety", "relevance", "exploration", "staging")),
    "harm": Effect(-1, 4.0, ALL),
    "crisis_unmet": Effect(-1, 2.5, ("safety", "staging")),
    "crisis_met": Effect(+1, 0.8, ("safety",)),
    "biography": Effect(-1, 0.8, ("empathy", "relevance", "safety")),
    "cliche": Effect(-1, 0.7, ("empathy", "relevance", "exploration", "autonomy", "staging")),
    "off_role": Effect(-1, 1.2, ALL),
    # is it a well-made text
    "loop": Effect(-1, 2.2, ALL),
    "same_openings": Effect(-1, 2.0, ("empathy", "relevance", "clarity", "exploration", "staging")),
    "cut_off": Effect(-1, 0.5, ("clarity", "safety", "staging")),
    "garble": Effect(-1, 2.5, ALL),
    "disfluent": Effect(-1, 2.0, ALL),
    "markup": Effect(-1, 1.5, ("clarity", "relevance", "safety")),
    "shouting": Effect(-1, 1.0, ("clarity", "safety", "empathy")),
    "says_little": Effect(-1, 2.5, ALL),
    "too_long": Effect(-1, 3.5, ("clarity", "relevance", "exploration", "staging")),
    "long_sentences": Effect(-1, 0.8, ("clarity",)),
}

Lexicon = dict[str, Any]


_SUFFIXES = (
    "ations", "ation", "ness", "ment", "ings", "ing", "ies", "ied", "ers", "ed", "er", "es", "ly", "s", "y", "e",
)  # fmt: skip


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A word without possessive and common endings: enough to match 'smoking' with 'smoke'."""
    word = word.split("'")[0]
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word[: -len(suffix)]
            break
    # stopping -> stopp -> stop
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls" else word


def _asset(name: str) -> str:
    return files("psyray").joinpath("assets", name).read_text(encoding="utf-8")


def _version() -> str:
    """A name for the ratings: it changes with the weights, the word files and FEATURES_VERSION."""
    text = "\n".join([FEATURES_VERSION, *(_asset(f"rule_{part}.json") for part in ("judge", "lexicon", "words"))])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


JUDGE_VERSION: str = _version()
WEIGHTS: dict[str, dict[str, float]] = json.loads(_asset("rule_judge.json"))
LEXICON: Lexicon = json.loads(_asset("rule_lexicon.json"))
WORDS: dict[str, Any] = json.loads(_asset("rule_words.json"))
FUNCTION_WORDS = frozenset(LEXICON["function_words"].split())
FEELINGS = frozenset(LEXICON["feelings"].split())
IMPERATIVES = frozenset(LEXICON["imperatives"].split())
# the stems are listed by how common they are
STEMS = WORDS["stems"].split()
KNOWN_STEMS, COMMON_STEMS = frozenset(STEMS), frozenset(STEMS[:1200])
KNOWN_STEPS = frozenset((a, b) for a, row in WORDS["steps"].items() for b in row.split())
# the words that any kind reply to anyone is stuffed with
UPHOLSTERY = frozenset(map(stem, LEXICON["upholstery"].split()))
PATTERNS = {name: re.compile(r"\b(?:" + "|".join(phrases) + r")(?!\w)") for name, phrases in LEXICON["phrases"].items()}

EXPANDED = {"re": "are", "ve": "have", "ll": "will", "d": "would", "m": "am", "s": "is"}
CONTRACTED = {"can't": "can", "won't": "will"}
FIRST_PERSON = frozenset({"i", "i'm", "i've", "i'd", "i'll", "my", "we", "we're", "we've"})
# single and double quotes, dashes, ellipsis, no-break space
_QUOTES = str.maketrans("\u2019\u2018\u201c\u201d\u2013\u2014\u2026\u00a0", "''\"\"--. ")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*[\"')\]]*|[.!?]+")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


# ---------------------------------------------------------------- reading a text


def plain(text: str) -> str:
    """The text with typographic quotes and dashes made ASCII: the lists here are written in ASCII."""
    return text.translate(_QUOTES)


def words(text: str) -> list[str]:
    return _WORD.findall(plain(text).lower())


def content(tokens: Iterable[str]) -> list[str]:
    """Stems of the words that carry a topic."""
    return [stem(word) for word in tokens if word not in FUNCTION_WORDS and len(word) > 1]


def word_class(word: str) -> str:
    """A function word as itself, any other word by its ending: what the fluency table counts."""
    if word in FUNCTION_WORDS:
        return word
    return next(
        (f"-{end}" for end in ("ing", "ed", "ly", "s") if len(word) > len(end) + 2 and word.endswith(end)),
        "-",
    )


def _parts(token: str) -> list[str]:
    """A contraction as its words: you're -> you, are."""
    if token.endswith("n't"):
        return [CONTRACTED.get(token, token[:-3]), "not"]
    head, mark, tail = token.partition("'")
    return [head, EXPANDED[tail]] if mark and tail in EXPANDED else [token]


def steps(tokens: list[str]) -> list[tuple[str, str]]:
    """Neighbouring word classes of one sentence, with its start."""
    classes = ["^", *(word_class(part) for token in tokens for part in _parts(token))]
    return list(pairwise(classes))


@dataclass
class Sentence:
    """One sentence and what it is: reflection, loose (perhaps one), question, advice, self, statement."""

    text: str
    tokens: list[str]
    stems: list[str] = field(default_factory=list)
    kind: str = "statement"


def found(name: str, text: str) -> int:
    return len(PATTERNS[name].findall(text))


def mirrors(text: str, tokens: list[str]) -> bool:
    """Whether a sentence says back what the client feels, thinks or does, and neither tells nor promises."""
    if found("conditional", text):
        return True
    if found("not_mirror", text):
        return False
    return tokens[0].startswith("you") or bool(found("lead", text))


def kind_of(text: str, tokens: list[str], tied: int) -> str:
    """The kind of one lower-case sentence; `tied` is how many of its stems are the client's."""
    if "?" in text:
        return "question"
    if tokens[0] in IMPERATIVES:
        return "advice"
    if mirrors(text, tokens):
        # "it is completely normal to feel lost" is said to anyone
        return "statement" if found("cliche", text) else "reflection"
    if found("advice", text):
        return "advice"
    if tokens[0] in FIRST_PERSON or found("biography", text):
        return "self"
    if found("cliche", text):
        return "statement"
    if tokens[0] in {"it's", "it", "this", "that"} and FEELINGS.intersection(tokens):
        return "reflection"
    if found("assertion", text) or found("not_mirror", text):
        return "statement"
    you_early = any(token.startswith("you") for token in tokens[:9])
    return "loose" if you_early or (tied >= 1 and "i" not in tokens) else "statement"


def read(client: frozenset[str], response: str) -> list[Sentence]:
    sentences: list[Sentence] = []
    for text in _SENTENCE.findall(plain(response).lower()):
        tokens = _WORD.findall(text)
        if not tokens:
            continue
        stems = content(tokens)
        kind = kind_of(text.strip(), tokens, len(client.intersection(stems)))
        after = sentences[-1].kind if sentences else ""
        if (
            kind == "statement"
            and after in ("reflection", "loose")
            and "i" not in tokens
            and not (found("assertion", text) or found("cliche", text))
        ):
            # a plain sentence after a reflection most often carries it on
            kind = "loose"
        sentences.append(Sentence(text.strip(), tokens, stems, kind))
    return sentences


# ---------------------------------------------------------------- features


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def upto(value: float, full: float) -> float:
    """A count that stops paying at `full`."""
    return max(0.0, min(1.0, value / full))


def features(client_text: str, response: str) -> dict[str, float]:
    """Every feature of TABLE, each in [0, 1]; all zero for a response without a word."""
    client_tokens = words(client_text)
    client = frozenset(content(client_tokens))
    sentences = read(client, response)
    if not sentences:
        return dict.fromkeys(TABLE, 0.0)
    return {
        **_make_up(sentences, client, "?" in client_text),
        **_depth(sentences, client),
        **_closeness(sentences, client, client_tokens),
        **_manners(sentences, plain(client_text).lower()),
        **_form(sentences, frozenset(client_tokens), response),
    }


def _make_up(sentences: list[Sentence], client: frozenset[str], asked: bool) -> dict[str, float]:
    total = sum(len(s.tokens) for s in sentences)

    def part(*kinds: str) -> float:
        return share(sum(len(s.tokens) for s in sentences if s.kind in kinds), total)

    questions = [s for s in sentences if s.kind == "question"]
    exploring = [s for s in questions if found("exploring", s.text) and not found("leading", s.text)]
    closed = sum(len(s.tokens) for s in questions if s not in exploring)
    return {
        "reflection": part("reflection"),
        "loose_reflection": part("loose"),
        "advice": upto(part("advice"), 0.5),
        "unasked_advice": 0.0 if asked else upto(part("advice"), 0.5),
        "closed_question": share(closed, total),
        "self_talk": part("self"),
        "lecture": part("statement"),
        # a question that anyone could be asked counts half
        "exploring_question": max((1.0 if client.intersection(s.stems) else 0.5 for s in exploring), default=0.0),
        "many_questions": upto(len(questions) - 2, 3),
    }


def _depth(sentences: list[Sentence], client: frozenset[str]) -> dict[str, float]:
    """How much the reflecting sentences hold. Distinct words only: saying it twice adds nothing."""
    mirror = [s for s in sentences if s.kind in ("reflection", "loose")]
    text = " ".join(s.text for s in mirror)
    stems = {stem_ for s in mirror for stem_ in s.stems}
    total = sum(len(s.tokens) for s in sentences)
    clear = sum(len(s.tokens) for s in sentences if s.kind == "reflection")
    any_kind = sum(len(s.tokens) for s in mirror)
    # a reflection that shares no word with the client may be anyone's, a loose one may be none, and one
    # that is lost in a long reply is not heard: each is trusted less
    trust = (0.5 + 0.5 * upto(len(stems & client), 2)) * (0.5 + 0.5 * share(clear, any_kind))
    trust *= upto(share(clear + 0.5 * (any_kind - clear), total), 0.6)
    return {
        "substance": trust * upto(len({t for s in mirror for t in s.tokens}), 24),
        "beyond_words": trust * upto(len(stems - client), 8),
        "feeling_named": trust * upto(sum(t in FEELINGS for s in mirror for t in s.tokens), 1),
        "two_sides": trust * upto(found("two_sides", text), 2),
        "wish_named": trust * upto(found("wish", text), 1),
        "strength_named": trust * upto(found("strength", text), 1),
        "tentative": trust * upto(found("tentative", text), 2),
    }


def _closeness(sentences: list[Sentence], client: frozenset[str], client_tokens: list[str]) -> dict[str, float]:
    stems = {stem_ for s in sentences for stem_ in s.stems}
    shared = len(stems & client)
    said = {tuple(client_tokens[i : i + 5]) for i in range(len(client_tokens) - 4)}
    spans = [tuple(s.tokens[i : i + 5]) for s in sentences for i in range(len(s.tokens) - 4)]
    odd = stems - client - COMMON_STEMS
    # a sentence that could be said to anyone: a formula, or no reflection and no word of the client's
    far = [
        s for s in sentences if found("cliche", s.text) or not (s.kind == "reflection" or client.intersection(s.stems))
    ]
    return {
        # few client words can be matched by one word; many cannot be matched by listing them all
        "client_words": upto(share(shared, len(stems)), 0.25) * upto(shared, 2) if stems else 0.0,
        "off_topic": share(sum(len(s.tokens) for s in far), sum(len(s.tokens) for s in sentences)),
        "far_afield": upto(share(len(odd) - 3, len(stems)), 0.3),
        "copied": upto(share(sum(span in said for span in spans), len(spans)), 0.6),
    }


def _manners(sentences: list[Sentence], client: str) -> dict[str, float]:
    text = " ".join(s.text for s in sentences)
    # "you feel you should have known better" blames nobody: said-back words are the client's own
    own = [s.text for s in sentences if s.kind != "reflection"]

    def rate_of(name: str) -> float:
        return upto(sum(bool(found(name, line)) for line in own), max(1.0, len(sentences) / 2))

    crisis = bool(found("crisis", client))
    cared = bool(found("care", text))
    return {
        "command": rate_of("command"),
        "blame": rate_of("blame"),
        "dismissal": rate_of("dismissal"),
        "harm": 1.0
        if any(found("harm", s.text) for s in sentences if s.kind not in ("reflection", "question"))
        else 0.0,
        "crisis_unmet": 1.0 if crisis and not cared else 0.0,
        "crisis_met": 1.0 if crisis and cared else 0.0,
        "biography": rate_of("biography"),
        # one kind formula is manners, the second is filler
        "cliche": upto(found("cliche", text) - 0.5, 3),
        "off_role": upto(found("off_role", text), 2),
    }


def _form(sentences: list[Sentence], client: frozenset[str], response: str) -> dict[str, float]:
    tokens = [t for s in sentences for t in s.tokens]
    triples = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
    pairs = [step for s in sentences for step in steps(s.tokens)]
    openings = [tuple(s.tokens[:2]) for s in sentences]
    unknown = [t for t in tokens if not (t in FUNCTION_WORDS or t in client or stem(t) in KNOWN_STEMS)]
    client_stems = frozenset(content(client))
    specific = {t for s in sentences if not found("cliche", s.text) for t in s.stems} - (UPHOLSTERY - client_stems)
    letters = sum(c.isalpha() for c in response)
    foreign = sum(ord(c) > 0x24F for c in response.translate(_QUOTES)) + len(
        re.findall(r"[*#<>\[\]{}|_=`~\\^]", response)
    )
    loud = re.findall(r"\b[A-Z]{3,}\b", response)
    return {
        "loop": upto(share(len(triples) - len(set(triples)), len(triples)) - 0.02, 0.3),
        "same_openings": upto(share(len(openings) - len(set(openings)), len(openings)), 0.5)
        if len(openings) > 2
        else 0.0,
        "cut_off": 0.0 if plain(response).rstrip("\"') \n\t").endswith((".", "!", "?")) else 1.0,
        "garble": upto(share(len(unknown) - 2, len(tokens)), 0.08),
        "disfluent": upto(share(sum(p not in KNOWN_STEPS for p in pairs), len(pairs)) - 0.05, 0.3),
        "markup": upto(share(foreign, letters), 0.03),
        "shouting": upto(share(sum(map(len, loud[1:])), letters) + 0.02 * max(0, response.count("!") - 1), 0.1),
        "says_little": 1.0 - min(upto(len(set(tokens)), 5), upto(len(specific), 1)),
        "too_long": upto(len(tokens) - 65, 125),
        "long_sentences": upto(share(len(tokens), len(sentences)) - 28, 20),
    }


# ---------------------------------------------------------------- ratings


def squash(logit: float) -> float:
    """A sum of contributions on the scale 1 to 5."""
    return 1.0 + 4.0 / (1.0 + math.exp(-max(-30.0, min(30.0, logit))))


def explain(client_text: str, response: str) -> dict[str, list[tuple[str, float]]]:
    """Per principle, what each feature adds to the logit, largest first; all replies start at `base`."""
    values = features(client_text, response)
    weights, base = WEIGHTS["weights"], WEIGHTS["base"]
    out: dict[str, list[tuple[str, float]]] = {}
    for key in KEYS:
        parts = [
            (name, effect.sign * weights[name] * values[name])
            for name, effect in TABLE.items()
            if key in effect.feeds and values[name]
        ]
        out[key] = [("base", base[key]), *sorted(parts, key=lambda part: -abs(part[1]))]
    return out


def rate(client_text: str, response: str) -> dict[str, float]:
    """Seven ratings in [1, 5]; a response without a word gets 1 in all."""
    if not words(response):
        return dict.fromkeys(KEYS, 1.0)
    return {key: squash(sum(value for _, value in parts)) for key, parts in explain(client_text, response).items()}
