"""The experts' page in a real browser: keys alone, two experts at once, a reload and a killed server in the middle."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browsing import dark_from_the_start, dressed, faults, fits_on_phones, refused_by_its_own_rules, tabbed, until

from psyray.active.ledger import Ledger, Question
from psyray.active.queue import ExpertQueue

ROOT = Path(__file__).parents[2]
TOKENS = {"anna": "anna-has-a-long-token", "ben": "ben-has-another-token"}
PAIRS = 10
SERVER = """
import sys
import uvicorn
from pathlib import Path
from psyray.rubric import load_rubric
from serve.access import read_keys
from serve.annotate import Desk, http_app
url, keys, port = sys.argv[1:]
people = read_keys(Path(keys))
desk = Desk(url, frozenset({"run"}), load_rubric("counselling"), 600, people, 6000, "Dr. Ito, room 4")
uvicorn.run(http_app(desk), host="127.0.0.1", port=int(port), log_level="error")
"""


class Server:
    """The page's server in a process of its own, always at the same port."""

    def __init__(self, url: str, keys: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [sys.executable, "-c", SERVER, url, str(keys), str(self.port)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, cwd=ROOT)
        until = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/healthz", timeout=30).raise_for_status()
                return
            except httpx.TransportError:  # it is still starting
                assert self.process.poll() is None and time.monotonic() < until
                time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Ten questions for two experts each."""
    found = Ledger(f"sqlite:///{tmp_path}/labels.db")
    said = [{"role": "user", "content": "Since the move I lie awake."}]
    asked = [
        Question(f"q{i}", "comparison", "experts", "r", {"messages": said, "a": f"good {i}", "b": f"poor {i}"})
        for i in range(PAIRS)
    ]
    ExpertQueue(found.database).open(found.reserve("run", "round-1", asked, None).to_ask, 2)
    yield found
    found.close()


@pytest.fixture
def server(tmp_path: Path, ledger: Ledger) -> Iterator[Server]:
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{name} annotate {token}\n" for name, token in TOKENS.items()))
    started = Server(f"sqlite:///{tmp_path}/labels.db", keys)
    yield started
    started.kill()


class Expert:
    """Somebody at the page, with a browser of their own, who uses the keyboard alone."""

    def __init__(self, browser, name: str, port: int, **context) -> None:
        self.page = browser.new_page(viewport={"width": 390, "height": 844}, **context)  # a phone's
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"http://127.0.0.1:{port}/")
        self.page.keyboard.type(TOKENS[name])
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#question:not([hidden])")

    def sees(self) -> tuple[str, str]:
        return self.page.inner_text("#left"), self.page.inner_text("#right")

    def says_which_is_good(self) -> None:
        """Press the key of the side that shows the good response, and wait for the next question or the end."""
        left, _ = before = self.sees()
        self.page.keyboard.press("1" if left.startswith("good") else "2")
        until(lambda: self.page.is_hidden("#question") or self.sees() != before)
        until(lambda: self.page.is_enabled("#undo"))

    def presses(self, key: str, answered: int) -> None:
        self.page.keyboard.press(key)
        until(lambda: self.page.inner_text("#progress").startswith(f"{answered} "))
        until(lambda: self.page.is_enabled("#undo"))


def test_two_experts_label_ten_pairs_through_a_reload_and_a_killed_server(browser, server, ledger):
    anna, ben = (Expert(browser, name, server.port) for name in TOKENS)
    for number in range(PAIRS):
        if number == 3:
            held = anna.sees()
            anna.page.reload()
            anna.page.wait_for_selector("#question:not([hidden])")
            assert anna.sees() == held  # the same question, the same way round
        if number == 5:
            server.kill()
            held = ben.sees()
            ben.page.keyboard.press("1")
            ben.page.wait_for_selector("#message:not([hidden])")
            assert "Nothing is lost" in ben.page.inner_text("#message") and ben.sees() == held
            server.start()
        if number == 7:  # the wrong key, and back
            ben.presses("h", 8)
            ben.presses("u", 7)
        anna.says_which_is_good()
        ben.says_which_is_good()
    for expert in (anna, ben):
        expert.page.wait_for_selector("#question", state="hidden")
        assert "no question for you" in expert.page.inner_text("#nothing")
        assert expert.page.inner_text("#progress").startswith("10 answered by you, 0 left for you")
        assert {url.split("/")[2] for url in expert.requests} == {f"127.0.0.1:{server.port}"}
    ids = [f"q{i}" for i in range(PAIRS)]
    ExpertQueue(ledger.database).settle(ids, undo_s=0)
    answers = ledger.answers(ids)
    assert len(answers) == PAIRS and {answer.answer["verdict"] for answer in answers.values()} == {"A"}
    shown = [vote["a_left"] for answer in answers.values() for vote in answer.answer["experts"]]
    assert len(shown) == 2 * PAIRS and set(shown) == {True, False}  # in either order, and blind to it


def test_it_works_by_keyboard_for_screen_readers_and_on_phones(browser, server):
    page = browser.new_page(bypass_csp=True)  # for axe-core, which is put into the page
    page.goto(f"http://127.0.0.1:{server.port}/")
    assert faults(page) == []
    page.close()
    anna = Expert(browser, "anna", server.port, bypass_csp=True)
    page = anna.page
    bar = page.get_by_role("progressbar", name="Questions that you have answered")
    until(lambda: bar.get_attribute("aria-valuenow"))  # the counts come after the question
    assert [bar.get_attribute(f"aria-value{name}") for name in ("min", "now", "max")] == ["0", "0", str(PAIRS)]
    for summary in page.locator("summary").all():
        summary.click()
    assert faults(page) == []
    fits_on_phones(page)
    assert page.get_by_role("article", name="Left response").is_visible()
    assert page.get_by_role("group", name="Your answer").get_by_role("button").count() == 5
    assert page.get_by_role("status").filter(has_text="0 answered by you").count() == 1
    assert page.get_by_role("combobox", name="Empathy and emotional understanding, right response").count() == 1
    assert "Dr. Ito, room 4" in page.inner_text("#contact")
    for summary in page.locator("summary").all():
        summary.click()
    anna.presses("t", 1)  # the next question is where the reader's voice goes on
    assert page.evaluate("() => document.activeElement.id") == "conversation-heading"
    assert bar.get_attribute("aria-valuenow") == "1"
    order = ["Ratings and a note, if you like", "left", "tie", "right", "skip", "harmful", "undo", "stop"]
    assert tabbed(page, 9) == [*order, "Keys, breaks, and what is hard to read"]
    server.kill()
    page.locator('[data-choice="tie"]').focus()
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()  # the trouble is told, and the focus is not lost
    assert page.evaluate("() => document.activeElement.dataset.choice") == "tie"


def test_keys_work_as_soon_as_a_question_is_shown(browser, server, ledger):
    anna, queue, held = Expert(browser, "anna", server.port), ExpertQueue(ledger.database), []
    for counts in ("progress", "agreement"):
        anna.page.route(f"**/experts/{counts}", lambda route: held.append(route))  # on their way for good
    anna.page.reload()
    anna.page.wait_for_selector("#question:not([hidden])")
    first = anna.sees()
    anna.says_which_is_good()
    anna.page.keyboard.press("u")
    until(lambda: anna.sees() == first)
    anna.says_which_is_good()
    assert held and queue.progress("anna")["answered"] == 1
    anna.page.unroute_all()
    anna.presses("t", 2)


def test_who_waits_for_a_question_is_told_once(browser, server, ledger):
    anna = Expert(browser, "anna", server.port)
    ExpertQueue(ledger.database).withdraw([f"q{i}" for i in range(PAIRS)], "the time is over")
    page = anna.page
    page.clock.install()
    page.reload()
    until(lambda: "no question for you" in page.inner_text("#nothing") and page.inner_text("#progress"))
    page.evaluate(
        "() => { window.told = 0; const watch = new MutationObserver(() => window.told++);"
        " for (const region of document.querySelectorAll('[role=status]'))"
        " watch.observe(region, { childList: true, characterData: true, subtree: true }); }"
    )
    for _ in range(3):  # it looks again
        with page.expect_event("requestfinished", lambda request: request.url.endswith("/agreement")):
            page.clock.run_for(11_000)
    assert page.evaluate("() => window.told") == 0


def test_it_wears_the_librarys_stylesheet_from_its_own_server(browser, server):
    dressed(browser, f"http://127.0.0.1:{server.port}/")
    dark_from_the_start(browser, f"http://127.0.0.1:{server.port}/")


def test_what_can_no_longer_be_undone_costs_no_word_of_the_note_on_the_next(browser, server, ledger):
    anna, queue = Expert(browser, "anna", server.port), ExpertQueue(ledger.database)
    anna.says_which_is_good()
    answered = [f"q{i}" for i in range(PAIRS) if queue.progress("anna", [f"q{i}"])["answered"]]
    assert queue.withdraw(answered, "the time is over") == 1
    anna.page.get_by_text("Ratings and a note").click()
    anna.page.get_by_label("Note").fill("takes up the move")
    anna.page.get_by_role("button", name="Undo").click()
    anna.page.get_by_role("alert").filter(has_text="is final").wait_for()
    until(lambda: anna.page.is_enabled("#undo"))
    assert anna.page.input_value("#note") == "takes up the move"


def test_ratings_come_back_with_undo_keys_can_be_switched_off_and_a_break_frees_the_question(browser, server, ledger):
    anna = Expert(browser, "anna", server.port)
    page, queue = anna.page, ExpertQueue(ledger.database)
    refused_by_its_own_rules(page)
    page.get_by_text("Ratings and a note").click()
    page.get_by_label("Empathy and emotional understanding, left response").select_option("4")
    page.get_by_label("Note").fill("takes up the move, not the fear")
    page.keyboard.press("1")  # typed into the note: no answer
    assert page.input_value("#note").endswith("fear1") and queue.progress("anna")["answered"] == 0
    page.locator("#conversation-heading").focus()
    anna.presses("2", 1)
    assert page.input_value("#note") == ""
    anna.presses("u", 0)
    assert page.input_value("#note").startswith("takes up the move")
    assert "right is better" in page.inner_text("#earlier")
    assert page.get_by_label("Empathy and emotional understanding, left response").input_value() == "4"
    page.get_by_text("Keys, breaks").click()
    page.get_by_label("Single keys do nothing").check()
    page.reload()
    page.wait_for_selector("#question:not([hidden])")
    assert page.locator("[aria-keyshortcuts]").count() == 0
    page.keyboard.press("t")
    page.get_by_role("button", name="Tie").click()
    until(lambda: page.inner_text("#progress").startswith("1 "))  # by the button alone
    until(lambda: queue.progress("anna")["leased"] == 1)  # the next question
    until(lambda: page.is_enabled("#undo"))
    page.get_by_role("button", name="Stop for now").click()
    until(lambda: page.is_visible("#sign-in") and page.is_hidden("#work"))
    assert queue.progress("anna")["leased"] == 0
    assert page.evaluate("() => sessionStorage.length + document.cookie.length") == 0
    assert {url.split("/")[2] for url in anna.requests if "invalid" not in url} == {f"127.0.0.1:{server.port}"}
