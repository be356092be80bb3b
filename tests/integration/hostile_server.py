"""A stand-in for an OpenAI-compatible endpoint that misbehaves on purpose; for tests only."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from endpoint import answering

KEYS = ("empathy", "relevance", "clarity", "safety", "exploration", "autonomy", "staging")
RATINGS = dict.fromkeys(KEYS, 4)
GOOD = json.dumps(RATINGS)
USAGE = {"prompt_tokens": 1000, "completion_tokens": 100}


@dataclass(frozen=True)
class Say:
    """One answer of the server."""

    text: str = GOOD
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    usage: dict[str, int] | None = field(default_factory=lambda: dict(USAGE))
    raw: bytes | None = None  # the whole body, in place of a chat answer
    do: str = ""  # "hang", "reset", "cut", "last": answer after 200 others have come, or never
    after_s: float = 0.0


def rated(**some: object) -> Say:
    return Say(json.dumps(RATINGS | some))


def soon() -> str:
    return formatdate(time.time() + 2, usegmt=True)


# What is answered to a response that holds the word; a list is gone through call by call, its last entry repeated.
SCRIPT: dict[str, list[Say]] = {
    "fine": [Say()],
    "last": [Say(do="last"), Say(status=400)],
    "steady": [Say(after_s=0.05)],
    "prose": [Say(f"Of course! Here you go: {GOOD} I hope that helps.")],
    "busy": [Say(status=429, headers={"Retry-After": "1"}), Say(status=503), Say()],
    "dated": [Say(status=429, headers={"Retry-After": "DATE"}), Say()],
    "weary": [Say(status=429, headers={"Retry-After": "86400"})],
    "broken": [Say(status=500)],
    "zero": [rated(clarity=0)],
    "six": [rated(empathy=6)],
    "ten": [rated(safety=10)],
    "half": [rated(empathy=4.5)],
    "quoted": [rated(empathy="4.5")],
    "chatty": [rated(empathy="my father died and I drink")],
    "endless": [Say('{"empathy": Infinity}')],
    "digits": [Say(f'{{"empathy": {"9" * 5000}}}')],
    "partial": [Say('{"empathy": 4}')],
    "listed": [Say(raw=json.dumps({"choices": [{"message": {"content": [1]}}], "usage": USAGE}).encode())],
    "cut": [Say(GOOD[:30]), Say()],
    "thoughtful": [Say(f"<think>At first {json.dumps(dict.fromkeys(KEYS, 1))}, or not?</think>\n{GOOD}")],
    "endlessly": [Say(f"<think>At first {json.dumps(dict.fromkeys(KEYS, 1))}, or")],
    "silently": [
        Say(raw=json.dumps({"choices": [{"message": {"content": None, "reasoning_content": "Well, "}}]}).encode())
    ],
    "nonsense": [Say("I'd rather not.")],
    "surrogate": [Say(raw=b'{"choices": [{"message": {"content": "\\ud800 no"}}]}')],
    "free": [Say(usage=None)],
    "refused": [Say(status=401)],
    "unfit": [Say(status=400)],
    "moved": [Say(status=307, headers={"Location": "/v1/elsewhere"})],
    "hang": [Say(do="hang")],
    "reset": [Say(do="reset"), Say()],
    "torn": [Say(do="cut")],
    "garbled": [Say(raw=b"{not json")],
    "foreign": [Say(raw=b'{"answer": "4"}')],
    "nested": [Say(raw=b"[" * 100_000)],
    "huge": [Say(raw=b" " * (5 * 2**20))],
}


class Hostile(ThreadingHTTPServer):
    """Counts calls by word, the keys it was shown, when calls came, and the most that were under way at once."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.calls: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.bodies: dict[str, dict] = {}  # the last one of each word
        self.came: list[tuple[float, str]] = []
        self.now = self.most = 0
        self.lock, self.stopped = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Hostile
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = body["messages"][-1]["content"].split("Counsellor's response:")[-1]
        word = next(w for w in SCRIPT if f"word {w} " in reply)
        with self.server.lock:
            say = SCRIPT[word][min(self.server.calls[word], len(SCRIPT[word]) - 1)]
            self.server.calls[word] += 1
            self.server.bodies[word] = body
            self.server.keys.add(self.headers.get("Authorization", ""))
            self.server.came.append((time.monotonic(), word))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        self._answer(say)

    def _over(self) -> None:
        """The call no longer counts as under way: before its client can know, who may send the next at once."""
        with self.server.lock:
            self.server.now -= 1

    def _answer(self, say: Say) -> None:
        if say.do == "hang":
            self._over()  # when its client gives it up only the client knows
            self.server.stopped.wait(30)
            self.close_connection = True
            return
        if say.do == "reset":
            self._over()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        while say.do == "last" and self.server.calls.total() < 200 and not self.server.stopped.wait(0.05):
            pass
        self.server.stopped.wait(say.after_s)
        self._over()
        answer = {"choices": [{"message": {"content": say.text}, "finish_reason": "stop"}]}
        content = say.raw or json.dumps(answer | ({"usage": say.usage} if say.usage else {})).encode()
        self.send_response(say.status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in say.headers.items():
            self.send_header(name, value.replace("DATE", soon()))
        self.end_headers()
        self.wfile.write(content[:20] if say.do == "cut" else content)
        self.close_connection = say.do == "cut"

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def hostile_server() -> Iterator[Hostile]:
    with answering(Hostile()) as server:
        try:
            yield server
        finally:
            server.stopped.set()
