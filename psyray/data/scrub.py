"""Personal details out of a text: e-mail addresses, links, phone numbers and names become [email], [link], ...

The rules are regular expressions and read no meaning. A name is taken only where the words before it say that it is
one: an introduction ("my name is", "Hi, I'm"), a relation ("my husband John"), "a girl named", "his name is", or a
closing line. Once found it is taken everywhere in that text. Names elsewhere, places, employers and dates stay.
`presidio` takes also the names that a spaCy model sees, and some words that are none; it needs the extra `scrub`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import yaml

from psyray.errors import PsyrayError
from psyray.sections.data import ASSETS

Scrub = Callable[[str], tuple[str, Counter[str]]]

KINDS = ("email", "link", "phone", "name")
PRESIDIO_MODEL = "en_core_web_lg"

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_LINK = re.compile(
    r"(?:https?://|www\.)[^\s<>\"']*[^\s<>\"'.,;:!?)\]]|(?<![\w@.])(?:[a-z0-9-]+\.)+(?:com|org|net|edu|gov|io)\b(?:/\S*)?",
    re.I,
)
# Groups of digits; `_is_phone` tells numbers to call from years, dates and amounts.
_DIGITS = re.compile(r"(?<![\w$£€.,/-])(?:\+\s?)?\(?\d{1,5}\)?(?:[ .-]{0,2}\(?\d{2,5}\)?){1,5}(?![\w/%]|[.,]\d)")
_SHORT_PHONE = re.compile(r"\d{3}[-.]\d{4}")

_NAME = r"[A-Z][a-z]+(?:['\u2019-][A-Z][a-z]+)?"
_FULL = rf"(?P<name>{_NAME}(?: {_NAME})?)(?!\w)"
_PERSON = (
    r"(?:ex[- ]?)?(?:step[- ]?)?(?:grand)?(?:husband|wife|spouse|partner|fianc[eé]e?|boyfriend|"
    r"girlfriend|bf|gf|mother|father|mum|mom|dad|parent|son|daughter|child|kid|baby|brother|sister|twin|uncle|aunt|auntie|cousin|nephew|niece|ma|pa|"
    r"(?:best |close |old |good )?friend|roommate|flatmate|housemate|colleague|co-?worker|boss|manager|teacher|"
    r"therapist|counsell?or|doctor|neighbou?r)(?:[- ]in[- ]law)?"
)
_SOMEONE = r"(?:girl|boy|man|woman|guy|lady|someone|somebody|person|people|kid|child|baby|lad|bloke|one|friend)"
# Case decides in a name, not in what leads to it.
_CUES = (
    r"(?i:my name(?:'s|\u2019s| is| was)) ",
    r"(?i:(?:his|her|their|whose|husband's|wife's|son's|daughter's) name(?:'s|\u2019s| is| was)) ",
    r"(?i:(?:i'm|i\u2019m|i am) called|(?:just |please |you can |everyone |people |they )call(?:s)? me) ",
    r"(?i:(?:hi|hello|hey)(?: there| all| everyone)?[,.!]? (?:i'm|i\u2019m|i am|this is|it's|my name is)) ",
    rf"(?i:my (?:\w+ )?{_PERSON},? (?:named |called )?\(?)",
    rf"(?i:(?:{_SOMEONE}|{_PERSON})(?: who is| who's)? (?:named|called)) ",
)
_CUED = re.compile(rf"\b(?:{'|'.join(_CUES)}){_FULL}")
_CLOSING = re.compile(
    r"(?i:\b(?:thanks|thank you|regards|sincerely|yours|love|cheers|best wishes)(?: so much| in advance| again)?)"
    rf"[,.!\s-]+{_FULL}[.!]?\s*$"
)

_WORDS = yaml.safe_load((ASSETS / "scrub.yaml").read_text())
_NOT_NAMES, _ALSO_WORDS = (frozenset(_WORDS[key].split()) for key in ("not_names", "also_words"))


def scrubber(kind: str) -> Scrub:
    """The scrubbing that `speeches.scrub` names; PsyrayError, once it is used, where something is not installed."""
    name, _, model = kind.partition(":")
    kinds: dict[str, Scrub] = {
        "regex": scrub,
        "presidio": partial(_presidio, model or PRESIDIO_MODEL),
        "off": lambda text: (text, Counter()),
    }
    return kinds[name]


def scrub(text: str) -> tuple[str, Counter[str]]:
    """The text with personal details replaced by their kind in brackets, and how many of each kind there were."""
    found: Counter[str] = Counter()

    def put(kind: str) -> Callable[[re.Match[str]], str]:
        def replace(hit: re.Match[str]) -> str:
            if kind == "phone" and not _is_phone(hit.group()):
                return hit.group()
            found[kind] += 1
            return f"[{kind}]"

        return replace

    text = _EMAIL.sub(put("email"), text)
    text = _LINK.sub(put("link"), text)
    text = _DIGITS.sub(put("phone"), text)
    for pattern in (_CUED, _CLOSING):
        text = _take_names(text, pattern, found)
    return text, found


def _is_phone(hit: str) -> bool:
    groups = re.findall(r"\d+", hit)
    digits = sum(map(len, groups))
    if re.fullmatch(r"(?:19|20)\d\d", groups[0]) and digits == 8:
        return False  # a span of years, or a date
    return (hit.startswith("+") and digits >= 8) or 10 <= digits <= 15 or bool(_SHORT_PHONE.fullmatch(hit))


def _take_names(text: str, cued: re.Pattern[str], found: Counter[str]) -> str:
    names: dict[str, None] = {}
    for hit in cued.finditer(text):
        words = [word for word in hit["name"].split() if word.lower() not in _NOT_NAMES]
        if words and words[0] == hit["name"].split()[0]:
            names[" ".join(words)] = None
    for name in names:
        if name.lower() in _ALSO_WORDS:
            # At its cue only: elsewhere it may be the word.
            text, count = _at_cue(text, cued, name)
        else:
            # A full name goes whole first, then each part of it alone.
            spellings = sorted({name, *name.split()} - {w for w in name.split() if w.lower() in _ALSO_WORDS}, key=len)
            any_of = "|".join(map(re.escape, reversed(spellings)))
            text, count = re.subn(rf"(?<!\w)(?:{any_of})(?!\w)", "[name]", text)
        found["name"] += count
    return text


def _at_cue(text: str, cued: re.Pattern[str], name: str) -> tuple[str, int]:
    count = 0
    for hit in reversed(list(cued.finditer(text))):
        if hit["name"].split()[0] == name:
            start = hit.start("name")
            text, count = text[:start] + "[name]" + text[start + len(name) :], count + 1
    return text, count


def _presidio(model: str, text: str) -> tuple[str, Counter[str]]:
    """The rules, then the names that are left: Presidio's own rules for addresses would ask the network."""
    text, found = scrub(text)
    spans = list[tuple[int, int]]()
    for hit in sorted(_analyzer(model).analyze(text=text, language="en", entities=["PERSON"]), key=lambda h: h.start):
        if spans and hit.start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], hit.end))
        elif not re.search(r"[][]", text[hit.start : hit.end]):  # a kind in brackets looks like a name
            spans.append((hit.start, hit.end))
    for start, end in reversed(spans):
        text = f"{text[:start]}[name]{text[end:]}"
    found["name"] += len(spans)
    return text, found


@cache
def _analyzer(model: str) -> Any:
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
    except ImportError as error:
        raise PsyrayError(
            'speeches.scrub is presidio, which is not installed: pip install "psyray[scrub]", or use regex'
        ) from error
    # Presidio would fetch a missing model by itself.
    if not spacy.util.is_package(model):
        raise PsyrayError(
            f"speeches.scrub is presidio and needs its model: python -m spacy download {model}; "
            "another one that is installed is named as presidio:MODEL"
        )
    return AnalyzerEngine(nlp_engine=SpacyNlpEngine([{"lang_code": "en", "model_name": model}]))
