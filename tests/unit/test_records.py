"""Ids, comparisons and the Arrow round trip."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from psyray.engines.chat import _read_reply
from psyray.records import JUDGEMENTS, Verdict, compare, conversation_id, normalise, rows, speech_id, table, well_formed

SCORES = st.none() | st.floats(1, 5)


@given(SCORES, SCORES, st.floats(0, 1))
def test_swap_twice_is_the_identity_and_swapping_the_sides_swaps_the_verdict(a, b, tie):
    comparison = compare("s", ("a", a), ("b", b), tie)
    assert comparison.swap().swap() == comparison
    assert compare("s", ("b", b), ("a", a), tie) == comparison.swap()


def test_two_scores_make_a_verdict_and_a_missing_one_makes_none():
    scores = [(3.0, 3.2, 0.5), (None, 3.2, 0.0), (3.0, 4.0, 0.5)]
    found = [compare("s", ("a", a), ("b", b), tie).verdict for a, b, tie in scores]
    assert found == [Verdict.TIE, Verdict.INVALID, Verdict.B]


def test_half_a_character_can_be_kept_and_named_by_an_id():
    cut = json.loads('"sad \\ud83d, \\ud83d\\ude00 and \\ude00"')
    assert well_formed(cut) == "sad \ufffd, \U0001f600 and \ufffd"
    assert speech_id([{"role": "user", "content": well_formed(cut)}])
    reply = _read_reply(json.dumps({"choices": [{"message": {"content": cut}}]}).encode())
    assert reply.text == well_formed(cut)


def test_ids_see_through_white_space_and_unicode_forms_but_not_through_words():
    def one(text: str) -> str:
        return speech_id([{"role": "user", "content": text}])

    assert one("caf\u00e9  is\nfull") == one("cafe\u0301 is full")
    assert one("a b") != one("a c")
    assert normalise(" a \n b ") == "a b"


def test_rows_come_back_from_arrow_as_they_went_in():
    row = {
        "response_id": "r",
        "speech_id": "s",
        "judge": "j",
        "ratings": {"empathy": 3.5},
        "score": 3.5,
        "status": "ok",
    }
    failed = {"response_id": "q", "status": "invalid", "error": "no JSON", "ratings": None}
    back = rows(table([row, failed], JUDGEMENTS))
    assert back[0]["ratings"] == {"empathy": 3.5} and math.isclose(back[0]["score"], 3.5)
    assert back[1]["ratings"] is None and back[1]["score"] is None and back[1]["error"] == "no JSON"


def test_all_lengths_of_a_conversation_have_one_id_and_a_single_speech_has_its_own():
    said = [("system", "Be kind."), ("user", "Hi."), ("assistant", "Hello."), ("user", "I cannot sleep any more."),
            ("assistant", "Since when?"), ("user", "Since the spring, when he left.")]  # fmt: skip
    talk = [{"role": role, "content": content} for role, content in said]
    short, long = talk[:4], talk
    ids = [conversation_id(speech_id(length), length, 10) for length in (short, long)]
    assert ids == [speech_id(short)] * 2
    assert conversation_id(speech_id(long), long, 3) == speech_id(talk[:2])
    assert conversation_id("its own", talk[1:2], 10) == "its own"
