"""The docs' pictures of the pages, taken anew in the tests' browser: the real pages, made words, stand-in policies.

python tests/integration/pictures.py                 those of the docs
python tests/integration/pictures.py --to FOLDER     both pages on a wide screen and a phone, in light and dark
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

from browsing import until
from PIL import Image
from playwright.sync_api import sync_playwright
from threaded import running
from two_policies import POLICIES, TOKEN, stand_in

from psyray.active.ledger import Ledger, Question
from psyray.active.queue import ExpertQueue
from psyray.active.votes import Choice
from psyray.rubric import load_rubric
from serve.access import parse_keys
from serve.annotate import Desk
from serve.annotate import http_app as experts_app
from serve.compare import Room
from serve.compare import http_app as compare_app
from serve.endpoint import Endpoint

DOCS = Path(__file__).parents[2] / "docs"
IN_DOCS = ("experts", "experts-phone", "compare")
SIZES = {"experts": (1100, 800), "compare": (1100, 1330)}  # CSS pixels
PHONE = (390, 844)
QUESTIONS, ANSWERED = 24, 12
CLIENT = (
    "Since my sister moved abroad the flat is too quiet in the evenings. I leave the radio on until I fall asleep. My "
    "friends say that I should just go out more, and then I feel that I am making a fuss about nothing."
)
GOOD = (
    "It sounds as if the evenings have become the loneliest part of the day, and when your friends tell you to go out "
    "more, you are left alone with that as well. What do you miss most when the flat goes quiet?"
)
POOR = (
    "You should try to go out more! Join a club, take up a sport, or get a pet. Many people feel lonely sometimes, and "
    "it always passes if you stay busy."
)
AGAIN = "Yes. As if I had no right to miss her."
SAID = {
    POLICIES[0]: [POOR, "Don't worry about what they say. Going out is a good idea, so make a plan and stick to it!"],
    POLICIES[1]: [
        GOOD,
        "So being told to go out leaves you with two things to carry: the quiet, and the thought that it should not "
        "bother you. When did that thought come up this week?",
    ],
}
TOKENS = {"experts": "anna-has-a-long-token", "compare": "carla-has-a-token-too"}


@contextmanager
def pages() -> Iterator[dict[str, str]]:
    """The addresses of both pages, the experts' one with an hour's answers of two people in its ledger."""
    keys = parse_keys([f"anna annotate {TOKENS['experts']}", f"carla compare {TOKENS['compare']}"], "here")
    rubric, contact = load_rubric("counselling"), "Dr. Ito, room 4"
    with tempfile.TemporaryDirectory() as folder, running(stand_in(SAID)) as policies:
        url = f"sqlite:///{folder}/labels.db"
        answer_some(Ledger(url))
        desk = Desk(url, frozenset({"run"}), rubric, 600, keys, contact=contact)
        room = Room(Endpoint(policies, TOKEN, 20), None, rubric, keys, url, "run", contact=contact)
        with running(experts_app(desk)) as experts, running(compare_app(room)) as compare:
            yield {"experts": experts, "compare": compare}


def answer_some(ledger: Ledger) -> None:
    """Half of the questions answered by anna and ben, who see two of them otherwise than she does."""
    payload = {"messages": [{"role": "user", "content": CLIENT}], "a": GOOD, "b": POOR}
    asked = [Question(f"q{place}", "comparison", "experts", "r", payload) for place in range(QUESTIONS)]
    queue = ExpertQueue(ledger.database)
    queue.open(ledger.reserve("run", "round-1", asked, None).to_ask, 2)
    for place in range(ANSWERED):
        for expert in ("anna", "ben"):
            lease = queue.lease(expert)
            good = Choice.LEFT if lease.left == GOOD else Choice.RIGHT
            queue.answer(expert, lease.question_id, Choice.TIE if expert == "ben" and place % 6 == 0 else good)
    queue.settle([question.question_id for question in asked], undo_s=0)
    ledger.close()


def enter(page: Any, url: str, token: str) -> None:
    """Sign in."""
    page.goto(url)
    page.wait_for_selector("#sign-in:not([hidden])")
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    page.wait_for_selector("#work:not([hidden])")


def at_a_question(page: Any) -> None:
    """The experts' page as it stands before an answer."""
    until(lambda: "Others said" in page.inner_text("#agreement"))


def in_conversation(page: Any) -> None:
    """The comparing page after one choice, the second answers and the reward model's view of them."""
    for words in (CLIENT, AGAIN):
        until(lambda: page.evaluate("() => document.activeElement.id") == "words")
        page.keyboard.type(words)
        page.keyboard.press("Enter")
        page.wait_for_selector("#choices:not([hidden])")
        until(lambda: page.is_enabled("#view"))
        if words == CLIENT:
            page.keyboard.press("1" if page.inner_text("#left") == GOOD else "2")
    page.keyboard.press("v")
    page.wait_for_selector("#left-view:not([hidden])")
    until(lambda: page.is_enabled("#view"))


READY = {"experts": at_a_question, "compare": in_conversation}


def take(browser: Any, folder: Path, names: Collection[str] | None = None) -> None:
    """Write the pictures, or those of these names, as NAME.png."""
    with pages() as urls:
        for kind, phone, scheme in product(urls, (False, True), ("light", "dark")):
            name = kind + "-phone" * phone + "-dark" * (scheme == "dark")
            if names is not None and name not in names:
                continue
            width, height = PHONE if phone else SIZES[kind]
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
            )
            enter(page, urls[kind], TOKENS[kind])
            READY[kind](page)
            page.evaluate("() => scrollTo({ top: 0, behavior: 'instant' })")
            picture = Image.open(BytesIO(page.screenshot()))
            picture.convert("RGB").quantize(256).save(folder / f"{name}.png", optimize=True)  # a third of its bytes
            page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, help="take all pictures, into this folder")
    folder = parser.parse_args().to
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        take(browser, folder or DOCS, None if folder else IN_DOCS)
        browser.close()


if __name__ == "__main__":
    main()
