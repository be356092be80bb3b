"""Which words raise the crisis flag, and which must not."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest

from psyray import crisis
from psyray.crisis import flag, hits, kinds, spoken

CRISES = [
    "I want to kill myself.",
    "Some days I think about killing myself and then I feed the cat.",
    "I've been having suicidal thoughts since March",
    "I just want to die",
    "I don\u2019t want to live anymore.",
    "I do not want to wake up tomorrow",
    "Everyone would be better off without me",
    "I wish I were dead",
    "I want it all to end.",
    "I keep thinking about ending my life.",
    "I took all my pills an hour ago",
    "last week I overdosed on paracetamol",
    "I don't see any way out, there's no point in living",
    "I've been cutting myself again",
    "I cut my wrists last night",
    "I SELF-HARM when it gets too loud",
    "I hurt myself, and nobody knows.",
    "My husband hits me when he drinks",
    "he beat me, he beats me most weekends",
    "I was raped last year",
    "My stepdad is hitting my sister",
    "He said he's going to kill me if I leave",
    "I'm scared he will hurt me",
    "He'll kill me one day",
    "my dad threatened to kill us",
    "I'm not safe at home",
    "I have a rope ready",
    "I'm trying not to kill myself",
    "I promised my mum not to hurt myself, but I can't stop",
    "I don't want to kill myself, I want it all to end",
    "I can't stop thinking about suicide",
    "I'm not lazy, I am suicidal",
    "I have no friends. I want to die",
    "I lie there and think I'm tired of being here at all.",
    "Sometimes I think it'd be easier if I just wasn't around.",
    "It would be simpler not to be here",
    "I go to bed hoping I won't wake up",
    "She said that she wanted to kill herself!",
    "Then I started hitting my head against the wall",
    "I don't even care if I live or die",
    "I have a history of sexual abuse",
    "I left an abusive relationship",
    "He hits me in the face",
    "We usually hit each other",
    "I was violently raped",
    "I wanna die",
    "I don't wanna live anymore",
    "i dont wanna live",
    "thinking about ending it all",
    "I'd rather die than go back",
    "i'm gonna die tonight",
    "im gonna kill myself",
    "I hope I die",
    "I took 40 pills",
    "swallowed about sixty sleeping tablets",
    "I'm not sure I want to live anymore",
    "I want to diiiie",
    "i think abuot killign myslef",
    "I'm scared, I am going to kill myself",
    "I work on a ward for children and I want to kill myself",
    "In the book club he hits me",
    "I should just drive off the bridge",
    "he put his hands round my throat",
    "His dad hits him for it.",
    "I snapped and slapped my son",
    # One or two of each family of words.
    "I just wanna stop existing",
    "I pray every night God takes me.",
    "I should've died in that crash",
    "I feel like dying",
    "I don't see myself living past 30",
    "I've decided this will be my last Christmas.",
    "I wrote letters to each of my kids for after.",
    "I tried to hang myself in March and I've been thinking about it again.",
    "I've got a gun in my nightstand and I sit on the bed holding it.",
    "Took half a bottle of benadryl and slept through it",
    "I took 30 of my mom's xanax last night",
    "I've been looking up how much tylenol it takes.",
    "I keep having this urge to just swerve into the oncoming lane.",
    "My best friend texted me that she's going to overdose.",
    "My husband has been saying he wants to end it all",
    "there are fresh cuts on my wrists",
    "I punched myself in the face until I saw stars",
    "I burned my arm with a hair straightener on purpose, I carved a word into my stomach",
    "She slapped me across the face in front of our son",
    "Dad broke my mom's nose",
    "Jake punched me in the stomach",
    "she scratches and bites me when we argue",
    "I'm being hit at home, I got beaten by my father for bad grades",
    "My uncle touched me when I was nine",
    "he makes me have sex even when I say no",
    "I'm scared to go home because of what he might do",
    "He said if I ever leave he'll find me and kill me",
    "my husband hitts me",
    "I want to kill my stepdad",
    "if I see him again I'll stab him",
    "I keep picturing myself pushing someone in front of a train",
    "I'm afraid I'll shake the baby if he doesn't stop screaming",
    "I'm going to bring my dad's gun to school",
    "I punched my boyfriend in the face",
    # What a denial, a setting or an idiom must not hide.
    "I need to talk about suicide",
    "I think this is domestic violence, it was sexual assault",
    "He shows signs of suicidal thinking",
    "As a nurse I want to die",
    "I'm a patient who self-harms",
    "he can't talk to me without hitting me",
    "I don't kill myself because of my kids",
    "I want to die for a while and then it passes",
    "I cut myself while I cry",
    "If he comes near her again I'm going to kill him",
    "I'd rather die than face another beating",
    "he'll kill me if he sees the messages",
]

CALM = [
    "",
    "I could have died of embarrassment when I fell off the stage.",
    "My boss is killing me with these deadlines",
    "I'm killing time until the bus comes",
    "I am dying to see her again",
    "It would be easier if she wasn't around when I study",
    "I'm tired of being the one who is here for everybody",
    "It is nicer to be here than at home",
    "I laughed so hard I nearly killed myself laughing",
    "I'm not suicidal, only tired.",
    "I have no thoughts of suicide.",
    "I don't have any plans to kill myself",
    "I've never thought about killing myself",
    "I don't want to die, I'm afraid of flying",
    "I would never want to hurt myself",
    "My brother beats me at chess every Sunday",
    "It hit me that the house was quiet",
    "the news hit me hard",
    "I cut myself some slack this week",
    "I cut myself off from my friends",
    "My mother died in spring and I miss her",
    "We had a fight and he slammed the door",
    "I feel safe with him",
    "I want to end it with my boyfriend",
    "I can't go on holiday this year",
    "My cat is 19 and the vet says he will die soon",
    "Mum will kill me if I am late again",
    "I burnt myself cooking dinner",
    "The plot: a detective, a rope, a locked room",
    "My parents kicked me out when I turned 18, they kicked me out of the house",
    "I have no history of sexual abuse",
    "Stress is killing me and it hits me harder every time",
    "I hit my head on the door frame and saw stars, but I laughed",
    "I don't want to hurt her feelings",
    "dying to meet you",
    "this job is killing me",
    "my phone died",
    "I could die of embarrassment",
    "The deadline is murder",
    "I killed it at the interview",
    "I'm gonna die of laughter",
    "I'd rather die than eat olives",
    "I have panic attacks and think I'm going to die",
    "I take 12 pills a day for my heart, and all my meds as prescribed",
    "I don't want to live with my parents any more",
    "I don't want to live in a small town",
    "I don't want to wake up the baby",
    "We walked under the bridge and then into the bus",
    "he broke my heart, threw me a party and kicked me out",
    "He hit on me and I nearly choked",
    "I gotta cut carbs, I wanna cut costs, I am cutting back",
    "I used to cut hair and slapped paint on the walls",
    "My cat is going to die",
    "In the novel she wants to die",
    "I teach a course about suicide",
    "How do I ask a client whether they think of suicide?",
    "I never tried or contemplated suicide",
    "I have never hurt myself",
    "It's going to hurt her to hear that",
    "My boyfriend doesn't hit me or shout, he just doesn't care.",
    "Nobody hits me and I have never been abused",
    "No suicidal thoughts, no self-harm, I'm just flat.",
    "I don't have any urges to hurt anyone",
    "I was so embarrassed I wanted to die.",
    "If I hear that song again I'm going to kill someone.",
    "This contract, it's strangling me",
    "I have an essay due on the causes of suicide",
    "What do I do if a client tells me that they self-harm?",
    "As a school nurse I see girls who self-harm.",
    "There's a scene in the opera where she stabs herself",
    "I beat my brother in the marathon",
    "My partner pushes me to be better",
    "She pulled my leg about it, he grabbed my hand and we ran",
    "I'm afraid of what my mother will say",
    "I'm scared that I will hurt his feelings",
    "I'm not going to be here next week, can we do Thursday?",
    "I want to end the relationship and leave this town",
    "They beat us three to one",
    "The loneliness hits me every Sunday",
    "I was locked out of my flat",
    "I've given away most of my old clothes",
]

KINDS = {
    "I want to die": ["self-harm"],
    "My husband hits me": ["abuse"],
    "He said he's going to kill me": ["abuse"],
    "I have thoughts about killing people": ["danger to others"],
    "I have these urges to hurt someone really bad": ["danger to others"],
    "I'm afraid that I might hurt my baby": ["danger to others"],
    "Sometimes I hit her when she cries": ["danger to others"],
    "I slapped my son yesterday": ["danger to others"],
    "I have violent thoughts": ["danger to others"],
    "I want to kill him and then myself, I'd rather be dead": ["self-harm", "danger to others"],
    "He beats me and I cut my arms": ["self-harm", "abuse"],
    "I would never hurt anyone": [],
    "I don't want to kill anyone": [],
    "I beat him at chess": [],
}


@pytest.mark.parametrize("text", CRISES)
def test_crisis_is_flagged(text: str) -> None:
    assert flag(text)


@pytest.mark.parametrize("text", CALM)
def test_calm_words_are_not(text: str) -> None:
    assert not flag(text)


@pytest.mark.parametrize(("text", "expected"), KINDS.items())
def test_the_kind_is_told(text: str, expected: list[str]) -> None:
    assert kinds(text) == expected


def test_several_texts_are_one_conversation() -> None:
    assert kinds("He hits me", "", "I want to die") == ["self-harm", "abuse"] and kinds() == []


TYPED = [
    *(f"I don{mark}t want to live" for mark in "'\u00b4`\u02b9\u02bb\u02bc\u2018\u2019\u201b\u2032\uff07\uff40"),
    *(f"I want to d{mark}ie" for mark in "\u00ad\u200b\u200c\u200d\u2060\ufeff\ufe0f\u0336"),
    "I want to *die*",
    "kill **myself**",
    "kill-myself",
    "I want to _die_",
    "I want to ***die***.",
    "I want to ~~die~~",
    "kill_myself",
    "I want to `die`",
    "I want to 'die'",
    "I want to \u201cdie\u201d",
    "I \u201ddon\u2019t\u201d want to live",
    "kill\u2011myself, kill\u2010myself",
    "I wish I could self-harm",
    "I _self-harm_",
    "I want to kill my co-worker",
    "my mother-in-law hits me",
    "is it over? it is not - suicidal since March",
    "it is not--suicidal since March",
    *(f"I just want to{pause}die" for pause in ("...", " ... ", "\u2026 ", " - ", "--", " \u2013 ", "\u2014")),
    "I'm going to kill .. my self",
]


@pytest.mark.parametrize("text", TYPED)
def test_ordinary_typing_hides_nothing(text: str) -> None:
    assert flag(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm *not* suicidal",
        "I`m not suicidal",
        "I\u00b4m \u00adnot suicidal",
        "I'm _never_ suicidal",
        "I don't want to... die",
    ],
)
def test_nor_does_it_hide_a_denial(text: str) -> None:
    assert not flag(text)


def test_many_marks_are_read_once() -> None:
    """Quadratic, these would take minutes."""
    for mark in ("*", "'", "-* ", "a*", "\u200b"):
        assert not flag(mark * (100_000 // len(mark)))


def test_a_sentence_may_stand_in_several_messages() -> None:
    user, therapist = ("user", "I want to"), ("assistant", "What is it?")
    assert kinds(*spoken([user, ("user", "die")])) == ["self-harm"]
    assert kinds(*spoken([user, ("system", "Be kind."), ("assistant", " "), ("user", "die")])) == ["self-harm"]
    assert kinds(*spoken([user, therapist, ("user", "die laughing")])) == []
    # A denial at the end of one message takes nothing from the next one.
    assert kinds(*spoken([("user", "I am not"), ("user", "suicidal thoughts again")])) == ["self-harm"]
    assert spoken([("system", "suicide"), ("assistant", "suicide"), ("user", "Hello.")]) == ["Hello."]


def test_case_spaces_and_apostrophes_do_not_matter() -> None:
    assert flag("I  WANT\nTO   DIE") and flag("I don\u2019t want to be alive") and flag("I don't want to be alive")


@pytest.mark.parametrize(
    "unit",
    [
        "my ",
        "i ",
        "I said no ",
        "wish i was a ",
        "hope a car ",
        "took 40 ",
        "a novel of the ",
        "voices a a a a ",
        "i just ",
        "he ",
        "the baby ",
        "bridge a ",
        "told me i ",
        "she said a ",
        "my son's ",
    ],
)
def test_a_long_text_of_beginnings_is_read_in_good_time(unit: str) -> None:
    """Half a second would be much; a repetition without a bound would take hours."""
    began = time.process_time()
    kinds(unit * (50_000 // len(unit)))
    assert time.process_time() - began < 5


GERMAN = {
    "Ich will nicht mehr leben": ["self-harm"],
    "ICH MÖCHTE STERBEN": ["self-harm"],
    "Ich mo\u0308chte sterben": ["self-harm"],  # the umlaut as a letter and a mark
    "ich moechte einfach nur noch sterben": ["self-harm"],
    "Ich denke an \u201eSelbstmord\u201c": ["self-harm"],
    "Wie kann ich mich umbringen?": ["self-harm"],
    "am liebsten würd ich mich vor den Zug werfen": ["self-harm"],
    "Ich bring mich um.": ["self-harm"],
    "Ich habe vierzig Tabletten genommen": ["self-harm"],
    "eine Überdosis": ["self-harm"],
    "Ich ritze mich, wenn es zu laut wird": ["self-harm"],
    "Meine Tochter ritzt sich": ["self-harm"],
    "Er schlägt mich": ["abuse"],
    "mein Mann hat mich gestern verprügelt": ["abuse"],
    "Ich wurde vergewaltigt": ["abuse"],
    "Mein Onkel hat mich als Kind missbraucht": ["abuse"],
    "Er hat gedroht, die Kinder umzubringen": ["abuse"],
    "Ich will ihn erstechen": ["danger to others"],
    "Ich habe Angst, dass ich meinem Kind etwas antue": ["danger to others"],
    "Ich will mich nicht umbringen": [],
    "Ich habe keine Suizidgedanken": [],
    "Ich denke nicht an Selbstmord": [],
    "Ich habe nicht vor, mich umzubringen": [],
    "Ich würde mir nie etwas antun": [],
    "Er hat mich nie geschlagen": [],
    "Niemand schlägt mich": [],
    "Ich lach mich tot": [],
    "zum Sterben schön": [],
    "Ich will nicht mehr in Berlin leben": [],
    "Er schlägt mich im Tennis": [],
    "Sie schlägt uns für den Preis vor.": [],
    "Beim Kochen habe ich mich geschnitten": [],
    "Im Film will sie sterben": [],
    "Ich schreibe ein Referat über häusliche Gewalt": [],
}


@pytest.mark.parametrize(("text", "expected"), GERMAN.items())
def test_german_is_read_beside_english(text: str, expected: list[str]) -> None:
    assert kinds(text) == expected


def test_a_hit_tells_the_language_of_its_phrase() -> None:
    both = "Ich will sterben. I want to die, he hits me."
    assert hits(both) == [("self-harm", "en"), ("self-harm", "de"), ("abuse", "en")] and hits("Guten Tag.") == []


@pytest.mark.parametrize(
    "unit",
    [
        "ich ",
        "ich will ",
        "will ihn ",
        "er schlaegt ",
        "mich so ",
        "vierzig ",
        "im roman ",
        "hat gedroht die ",
        "gedanken an die ",
        "stimmen die ",
        "schneide so ",
        "wird von der ",
        "von der bruecke ",
        "vor so ",
        "fuer das ",
        "kein ",
    ],
)
def test_a_long_german_text_of_beginnings_is_read_in_good_time(unit: str) -> None:
    began = time.process_time()
    kinds(unit * (50_000 // len(unit)))
    assert time.process_time() - began < 5


def test_every_repetition_of_words_has_a_bound() -> None:
    """`\\w*` ends at the word; what may pass a space must be counted."""
    for file in crisis.FILES:
        lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert not [line for line in lines if re.search(r"\.[*+]|[)\]][*+]", line)]


class Counted:
    """A pattern that adds up how many characters it was given."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern, self.characters = pattern, 0

    def finditer(self, words: str, start: int, end: int) -> list[re.Match[str]]:
        self.characters += end - start
        return list(self.pattern.finditer(words, start, end))


def test_what_stands_before_a_phrase_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a request of many denied phrases would hold up everybody's for minutes."""
    counted = {}
    for times in (1_000, 2_000):
        pattern = Counted(re.compile(r"[.,]"))
        monkeypatch.setattr(crisis, "RULES", (replace(crisis.RULES[0], clause=pattern),))
        assert not flag("i'm not suicidal " * times)
        counted[times] = pattern.characters
    assert 0 < counted[2_000] <= 2.1 * counted[1_000]


@pytest.mark.parametrize("far", ["so ", "so, ", "but "])
def test_a_denial_counts_however_long_the_text_before_it(far: str) -> None:
    assert not flag(far * 500 + "I do not really have any serious thoughts about suicide")
    assert flag("I'm not " + far * 500 + "suicidal") and flag(far * 500 + "suicidal")
