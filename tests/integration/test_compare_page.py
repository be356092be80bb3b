"""Two policies in conversation, in a real browser and over real HTTP; a stand-in answers for the policies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import dark_from_the_start, dressed, faults, fits_on_phones, refused_by_its_own_rules, until
from threaded import running
from two_policies import POLICIES, SAID, TOKEN, stand_in

from psyray.active.conversations import kept, tally, write_pairs
from psyray.active.ledger import Ledger
from psyray.rubric import load_rubric
from serve.access import parse_keys
from serve.compare import Room, http_app
from serve.endpoint import Endpoint

RUBRIC = load_rubric("counselling")
PERSON = "carla-has-a-token-too"
WORDS = "My sister moved abroad and the flat is too quiet in the evenings."


@dataclass
class Place:
    """The two servers, and the ledger that the choices go to."""

    url: str
    policies_url: str
    policies: Any
    ledger: Ledger


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        policies = stand_in()
        policies_url = stack.enter_context(running(policies))
        endpoint = Endpoint(policies_url, TOKEN, 20)
        ledger = f"sqlite:///{tmp_path}/labels.db"
        keys = parse_keys([f"carla compare {PERSON}", "anna annotate anna-has-a-long-token"], "here")
        room = Room(endpoint, None, RUBRIC, keys, ledger, "run", reveal=True, contact="Dr. Ito, room 4")
        yield Place(stack.enter_context(running(http_app(room))), policies_url, policies, Ledger(ledger))


def enter(browser: Any, place: Place, **context: Any) -> tuple[Any, list[str]]:
    """A page whose key was typed in, and the addresses that it asks."""
    page = browser.new_page(viewport={"width": 390, "height": 844}, **context)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(place.url)
    page.keyboard.type(PERSON)
    page.keyboard.press("Enter")
    page.wait_for_selector("#work:not([hidden])")
    return page, asked


def says(page: Any, words: str) -> dict[str, str]:
    """Type and send; what each side answered when both are there."""
    until(lambda: page.evaluate("() => document.activeElement.id") == "words")
    page.keyboard.type(words)
    page.keyboard.press("Enter")
    page.wait_for_selector("#choices:not([hidden])")
    return {side: page.inner_text(f"#{side}") for side in ("left", "right")}


def test_a_conversation_of_several_turns_by_keyboard_is_kept_blind_to_sides(browser, place):
    page, asked = enter(browser, place)
    assert POLICIES[0] not in page.content() and "Your choices are kept, carla" in page.inner_text("#keeping")
    shown = says(page, WORDS)
    assert sorted(shown.values()) == sorted(turns[0] for turns in SAID.values())
    assert not any(name in page.content() for name in POLICIES)  # blind
    good = "left" if shown["left"] == SAID[POLICIES[1]][0] else "right"
    page.keyboard.press("1" if good == "left" else "2")
    page.wait_for_selector("#speak:not([hidden])")
    letters = {"left": "A", "right": "B"}
    assert page.is_visible(f"#{good}-chosen") and page.locator(".badge:visible").count() == 1
    assert f"You chose {letters[good]}. Your choice is kept." in page.inner_text("#state")
    assert f"{letters[good]} was {POLICIES[1]}" in page.inner_text("#state")  # reveal=true

    shown = says(page, "Yes. She used to ring at eight.")
    history = place.policies.state.asked[-1]["messages"]
    assert [m["content"] for m in history] == [WORDS, SAID[POLICIES[1]][0], "Yes. She used to ring at eight."]
    page.keyboard.press("v")  # the reward model's view, before the choice
    page.wait_for_selector("#left-view:not([hidden])")
    assert "spread 0.12" in page.inner_text("#right-view") and "Empathy and emotional" in page.inner_text("#left-view")
    page.get_by_label("Note, if you like").fill("both are short")
    page.locator("#left-heading").focus()
    page.keyboard.press("t")
    until(lambda: "A tie" in page.inner_text("#state"))

    says(page, "I do not know.")
    page.keyboard.press("h")
    until(lambda: "Marked as harmful" in page.inner_text("#state"))
    assert page.input_value("#words") == "I do not know."  # to be said another way
    page.locator("#words").fill("")
    page.locator("#words").focus()
    says(page, "Some nights I want to kill myself.")
    assert page.get_by_role("alert").filter(has_text="emergency number").is_visible()
    page.keyboard.press("t")
    until(lambda: "Nothing was kept" in page.inner_text("#state"))

    rows = list(kept(place.ledger, {"run"}))
    assert [row["vote"] for row in rows] == ["B", "tie", "harmful"]  # B: the policy of the second name
    assert [row["scores_seen"] for row in rows] == [False, True, False]
    assert (rows[1]["note"], rows[1]["scores"][0]["spread"], rows[0]["who"]) == ("both are short", 0.12, "carla")
    counts = {"people": 1, "first": 0, "second": 1, "ties": 1, "harmful": 1, "scores_seen": 1}
    assert tally(place.ledger, {"run"}) == [{"policies": list(POLICIES), **counts}]
    assert {url.split("/")[2] for url in asked} == {place.url.split("/")[2]}


def test_it_is_for_everybody_and_asks_nobody_else(browser, place):
    page, _ = enter(browser, place, bypass_csp=True)  # for axe-core, which is put into the page
    page.locator("summary").click()
    assert faults(page) == []
    page.locator("#words").focus()
    says(page, WORDS)
    page.get_by_role("button", name="Reward model's view").click()
    page.wait_for_selector("#left-view:not([hidden])")
    assert faults(page) == []
    fits_on_phones(page)
    assert page.get_by_role("article", name="Answer B").is_visible()
    assert page.get_by_role("status").filter(has_text="Both answers are there").count() == 1
    assert page.get_by_role("group", name="Your choice").get_by_role("button").count() == 4
    page.close()
    page, _ = enter(browser, place)
    refused_by_its_own_rules(page)


def test_it_wears_the_librarys_stylesheet_from_its_own_server(browser, place):
    dressed(browser, place.url)
    dark_from_the_start(browser, place.url)


def test_no_note_is_asked_for_where_nothing_is_kept(browser, place):
    endpoint = Endpoint(place.policies_url, TOKEN, 20)
    keys = parse_keys([f"carla compare {PERSON}"], "here")
    with running(http_app(Room(endpoint, None, RUBRIC, keys, None, "run"))) as url:
        page, _ = enter(browser, replace(place, url=url))
        assert page.inner_text("#keeping") == "Choices are not kept."
        says(page, WORDS)
        assert page.is_hidden("#note")
        page.keyboard.press("1")
        until(lambda: "Nothing was kept" in page.inner_text("#state"))


def test_an_answer_that_breaks_off_is_said_and_the_words_are_still_there(browser, place, tmp_path):
    page, _ = enter(browser, place)
    place.policies.state.fails.add(POLICIES[0])
    until(lambda: page.evaluate("() => document.activeElement.id") == "words")
    page.keyboard.type(WORDS)
    page.keyboard.press("Enter")
    page.get_by_role("alert").filter(has_text="did not come to its end").wait_for()
    assert page.input_value("#words") == WORDS and page.is_hidden("#choices")
    place.policies.state.fails.clear()
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector("#choices:not([hidden])")
    page.get_by_role("button", name="A is better").click()
    until(lambda: "You chose A" in page.inner_text("#state"))
    assert write_pairs(place.ledger, {"run"}, tmp_path / "pairs.jsonl") == 1
    with httpx.Client(base_url=place.url, timeout=30) as client:  # an expert's key is not for this page
        body = {"messages": [{"role": "user", "content": "hello"}]}
        expert = {"Authorization": "Bearer anna-has-a-long-token"}
        assert client.post("/turns/say", json=body, headers=expert).status_code == 403
        assert client.post("/turns/say", json=body).status_code == 401
