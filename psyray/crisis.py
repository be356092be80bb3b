"""Whether a client's words speak of a crisis, and of which kind: a transparent phrase list, not a diagnosis.

A hit says that a person should look at the conversation; no hit says nothing. The list covers plain English in
three kinds (`PHRASES`): self-harm with suicide, abuse of the client or those around them, and danger to others. It
reads words, not meaning: hints, other languages and most slang go by unseen, and a sentence about somebody else, the
past or a film counts as much as one about now. Where it must err it flags. How often: docs/crisis.md.

A phrase does not count where the words just before it deny it ("I have no thoughts of suicide", "I'm not
suicidal"). "Trying not to hurt myself" is no denial and counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from itertools import groupby

_WISH = r"(?:want|wanted|wanting|wish|hope|hoping|going|planning|plan|planned|decided|ready|deserve)"
_THEM = r"(?:he|she|they|my [a-z' -]{2,30}?)"
_KIN = r"(?:mum|mom|mother|dad|father|wife|kids?|children|child|brother|sister|baby|son|daughter)"
_US = rf"(?:me|us|my {_KIN})"
_OTHERS = (
    r"(?:him|her|them|someone|somebody|people|others|other people|everyone|anyone|"
    rf"my (?:{_KIN}|husband|partner|family|boyfriend|girlfriend|ex|boss|neighbou?rs?|roommate|co[- ]?workers?))"
)
_WILL = r"(?:'ll| will| would|'s going to|'re going to| is going to| are going to| might)"
_HARM = r"(?:hurt|harm|cut|burn|punish)(?:ting|ing|ed|t)?"
_ATTACK = r"(?:kill|stab|shoot|strangle|strangl|smother|drown|murder|attack|harm)(?:ing)?"
_MEANS = r"(?:gun|pills|rope|noose|knife)"
_HAS = rf"(?:has|have|had|got|holding|hold|held|puts?|found|bought) (?:a |the |his |her |my )?{_MEANS}"
_FEAR = r"(?:afraid|scared|terrified|fear|worried)"

PHRASES: dict[str, tuple[str, ...]] = {
    "self-harm": (
        r"(?:kill|hang|shoot|drown|poison)(?:ing|ed)? my ?self(?! (?:laughing|over|at work|with work))",
        r"suicid(?:e|al)\w*",
        rf"{_WISH}(?: to| that)?(?: just)? die\b(?! (?:of|from) (?:embarrassment|shame|laughter))",
        r"(?:wish|wishing) (?:that )?i (?:was|were) (?:dead|never born)",
        r"(?:rather|want to|wanna) be dead|better off dead",
        r"(?:better off|be happier|be fine) (?:if i (?:was|were) (?:dead|gone)|without me)",
        r"(?:end|ending|take|taking|took) my (?:own )?life",
        r"(?:want|need|ready|going) to (?:end it all|end it(?! with\b)|stop living|stop existing)",
        r"want (?:it all|everything) to (?:end|be over)",
        r"(?:don'?t|do not|no longer) (?:want|wish) to (?:live|be alive|exist|wake up|be here any ?more)",
        r"(?:can'?t|cannot) go on (?:like this|living|any ?more)",
        # Passive wishes: what people say long before they say the word.
        r"(?:tired|sick|weary) of (?:being (?:here|alive)|living|life)\b",
        r"(?:easier|simpler|better|best|nicer) (?:not to be (?:here|alive|around)"
        r"|if i (?:just )?(?:wasn'?t|weren'?t|was not|were not) (?:around|here|alive))",
        r"(?:wish|wished|hope|hoped|hoping) (?:that )?i (?:wouldn'?t|would not|don'?t|did not|didn'?t|won'?t) wake up",
        r"(?:not|never) (?:want(?:ing)? to )?wak(?:e|ing) up (?:any ?more|again|at all)",
        r"no (?:reason|point) (?:to|in) (?:live|living|go on|going on)",
        r"overdos(?:e|ed|ing)",
        r"jump(?:ing|ed)? (?:off|from) (?:a|the) (?:bridge|roof|building|balcony)",
        r"(?:wrote|written|writing) (?:a |my )?goodbye (?:letter|note)s?",
        rf"{_HARM} my ?self\b(?! (?:off|short|shaving|cooking|some slack))",
        r"self[- ]?harm\w*",
        r"(?:kill|hang|cut|harm|drown)(?:ting|ing|ed)? (?:himself|herself|themselves)",
        r"(?:hit|hitting|punch|punching) my ?self|(?:hitting|bang|banging) my head (?:on|against|into)",
        r"hit my head (?:on|against) (?:the |a )?walls?\b",
        r"better off not (?:being )?(?:in this world|here|alive)",
        r"(?:care|matters?|cares) (?:if|whether) i (?:live|die)\b",
        r"(?:cut|cutting|slit|slitting) my (?:wrists?|arms?|thighs?|legs?)",
        rf"{_HAS} (?:to my head|in my hand|ready|next to me|in front of me|saved up)",
        r"(?:took|taken|swallowed) (?:all|too many|a (?:whole )?(?:bottle|box|pack|lot|bunch))(?: of)?"
        r"(?: my| the| his| her)? (?:pills|tablets|medication|meds|paracetamol)",
        r"(?:not safe|unsafe) (?:right now|tonight|with myself)",
    ),
    "abuse": (
        rf"{_THEM} (?:hits?|beats?|punche[sd]|kick(?:s|ed)|chok(?:es|ed)|strangl(?:es|ed)|slap(?:s|ped)) {_US}\b"
        r"(?! (?:up for|to it|at|out|off)\b)",
        rf"{_THEM} (?:is|are|was|were|keeps?|started) (?:hitting|beating|kicking|choking|strangling) {_US}\b",
        rf"{_THEM} (?:rap(?:es|ed)|molest(?:s|ed)|sexually (?:abuse[sd]?|assault(?:s|ed)?)) {_US}\b",
        r"(?:was|were|been|being|got|get) (?:\w+ly )?(?:raped|molested|sexually (?:abused|assaulted))",
        r"raped (?:at|by|when)\b",
        r"(?:sexual|physical|domestic|child) (?:abuse|violence|assault)\b",
        r"(?:physically|sexually) (?:(?:and|or) \w+ )?abus(?:ed|es|ing|ive)",
        r"abusive (?:relationship|marriage|home|house|household|childhood|situation|husband|wife|partner|boyfriend|"
        r"girlfriend|ex|father|mother|parents?|dad|mom|mum|men|man)",
        r"(?:hit|hits|hitting|beat|beating) each other(?! at\b)",
        r"(?:force[sd]?|made|makes) me (?:to )?have sex",
        r"(?:is|are|am|was|been) being (?:physically |sexually )?abused",
        rf"(?:going to|gonna|will|(?:he|she|they)'ll|might|wants? to) kill {_US}\b(?! (?:for|if i|when i)\b)",
        rf"(?:sa(?:id|ys)|threaten(?:s|ed)|swore|swears) (?:that )?{_THEM}{_WILL} (?:kill|hurt|shoot) {_US}\b",
        rf"(?:threaten(?:s|ed|ing)|tried) to (?:kill|hurt|shoot|strangle|drown) {_US}\b",
        rf"{_FEAR} (?:that )?{_THEM}{_WILL} (?:kill|hurt) {_US}\b",
        rf"{_HAS} to my (?:head|throat)",
        r"(?:not safe|unsafe|in danger) (?:at home|here|right now|tonight|with (?:him|her|them))",
    ),
    "danger to others": (
        rf"(?:going to|gonna|will|i'll|'d like to|might|wants? to|wanted to) kill {_OTHERS}\b"
        r"(?! (?:for|if i|when i)\b)",
        rf"(?:sa(?:id|ys)|threaten(?:s|ed)|swore|swears) (?:that )?{_THEM}{_WILL} (?:kill|hurt|shoot) {_OTHERS}\b",
        rf"(?:threaten(?:s|ed|ing)|tried) to (?:kill|shoot|strangle|drown|stab) {_OTHERS}\b",
        rf"(?:want|wanted|urges?|impulses?|going|gonna|plan|planning) (?:to )?(?:physically )?"
        rf"(?:{_ATTACK}|hurt) {_OTHERS}\b",
        rf"(?:thoughts?|thinking|think|fantas(?:ies|i[sz]e|i[sz]ing)|dream|dreaming|visions) (?:of|about) "
        rf"(?:{_ATTACK}|hurting) {_OTHERS}\b",
        rf"{_FEAR} (?:that )?i(?:'ll| will| might| may| could|'m going to) (?:snap and )?"
        rf"(?:{_ATTACK}|hurt) {_OTHERS}\b",
        rf"\bi (?:have |once |sometimes )?(?:hit|beat|slapped|shook|punched|choked|strangled|kicked) {_OTHERS}\b"
        r"(?! (?:up for|to it|at|up with|out|off)\b)",
        rf"how i (?:could|would|can|might) (?:{_ATTACK}|hurt) {_OTHERS}\b",
        r"violent (?:thoughts|urges|impulses|fantasies)",
        r"homicid(?:e|al)\w*",
        rf"{_HAS} to (?:her|his|their) (?:head|throat)",
    ),
}

_NOT = r"\b(?:do not|don'?t|never|did not|didn'?t|have not|haven'?t|would never|wouldn'?t)(?: actually| really| even)?"
_PLAN = r"(?:thoughts?|plans?|intentions?|intent|desire|wish|history|urges?)(?: (?:of|to|about|for))?(?: or \w+)?"
# What denies a phrase when it is the last thing said before it.
_DENIALS = (
    rf"\b(?:no|without|without any) (?:\w+ )?{_PLAN}",
    rf"{_NOT} (?:have|had)(?: any)? (?:\w+ )?{_PLAN}",
    rf"{_NOT} (?:want|wanted|wish|wished) to",
    rf"(?:{_NOT}|\bnot) (?:thought|think|thinking|considered|considering|felt|feel|feeling|been|planning)"
    r"(?: (?:of|about|to))?",
    r"(?:\bam|\bare|\bis|\bwas|'m|'re|'s) (?:definitely |absolutely )?(?:not|never)(?: actually| really| being)?",
    r"\b(?:isn'?t|aren'?t|wasn'?t)(?: actually| really)?",
)
_DENIED = re.compile(rf"(?:{'|'.join(_DENIALS)})\s*$")
# The wish may be the phrase's own first word, so that the denial stands right before it.
_WISHED, _DENIED_WISH = re.compile(rf"{_WISH}\b"), re.compile(rf"(?:{_NOT}|\bnot)\s*$")
_CLAUSE = re.compile(r"[.!?;:,()]|\b(?:but|although|though|except)\b")
_LOOK_BACK = 120  # characters before a phrase in which a denial of it may stand; the longest have some 80
# What keyboards put for an apostrophe (acute, grave, prime, modifier letters, quotation marks), and hyphens.
_STRAIGHT = dict.fromkeys(map(ord, "\u00b4`\u02b9\u02bb\u02bc\u02c8\u2018\u2019\u201b\u2032\u2035\uff40"), "'")
_STRAIGHT |= dict.fromkeys(map(ord, "\u2010\u2011"), "-") | dict.fromkeys(map(ord, "\u201c\u201d"), '"')
_UNSEEN = ("Cf", "Mn")  # soft hyphens, zero-width characters and the like; marks drawn onto a letter
_MARKS = re.compile(r"[-*_~\"']+")
_PAUSES = re.compile(r"\.{2,}|--+|[\u2013\u2014]|(?<=\s)-(?=\s)")
_KINDS = {kind: re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})") for kind, phrases in PHRASES.items()}


def flag(text: str) -> bool:
    """Whether the text holds a phrase that speaks of a crisis of any kind."""
    return bool(kinds(text))


def kinds(*texts: str) -> list[str]:
    """The kinds of crisis that the texts hold a phrase of, in the order of PHRASES."""
    plain = [reading for text in texts for reading in _readings(text)]
    return [kind for kind, phrases in _KINDS.items() if any(_holds(words, phrases) for words in plain)]


def _holds(words: str, phrases: re.Pattern[str]) -> bool:
    return any(not _denied(hit) for hit in phrases.finditer(words))


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


def _denied(hit: re.Match[str]) -> bool:
    """Whether the end of the clause before the phrase denies it."""
    # Not all that stands before: a text of many phrases would be read once for each of them.
    words, end = hit.string, hit.start()
    start = max(0, end - _LOOK_BACK)
    start = max((mark.end() for mark in _CLAUSE.finditer(words, start, end)), default=start)
    wished = _WISHED.match(hit.group())
    return bool(_DENIED.search(words, start, end) or (wished and _DENIED_WISH.search(words, start, end)))
