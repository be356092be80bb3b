"""The experts' page in a real browser: keys alone, two experts at once, a reload and a killed server in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

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
desk = Desk(url, frozenset({"run"}), load_rubric("counselling"), 600, read_keys(Path(keys)), 6000)
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
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Debian's Chromium without a window; a missing one is a failure only where .ci/run installs it."""
    program = shutil.which("chromium")
    if program is None:
        promised = os.environ.get("CI") == "true" and "chromium" in (ROOT / ".ci/run").read_text()
        (pytest.fail if promised else pytest.skip)("no Chromium (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


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

    def __init__(self, browser, name: str, port: int) -> None:
        self.page = browser.new_page(viewport={"width": 390, "height": 844})  # a phone's
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


def until(holds: Callable[[], bool]) -> None:
    """Wait from here: the page's own rules forbid scripts that are made up on the way."""
    last = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < last
        time.sleep(0.02)


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
        expert.page.wait_for_selector("#nothing:not([hidden])")
        assert expert.page.inner_text("#progress").startswith("10 answered by you, 0 left for you")
        assert {url.split("/")[2] for url in expert.requests} == {f"127.0.0.1:{server.port}"}
        assert expert.page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    ids = [f"q{i}" for i in range(PAIRS)]
    ExpertQueue(ledger.database).settle(ids, undo_s=0)
    answers = ledger.answers(ids)
    assert len(answers) == PAIRS and {answer.answer["verdict"] for answer in answers.values()} == {"A"}
    shown = [vote["a_left"] for answer in answers.values() for vote in answer.answer["experts"]]
    assert len(shown) == 2 * PAIRS and set(shown) == {True, False}  # in either order, and blind to it
