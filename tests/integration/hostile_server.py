"""A stand-in for an OpenAI-compatible endpoint that misbehaves on purpose; for tests only."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEYS = ("empathy", "relevance", "clarity", "safety", "exploration", "autonomy", "staging")
GOOD = json.dumps(dict.fromkeys(KEYS, 4))

# What is answered to a response that holds the word; a list is gone through call by call, its last entry repeated.
SCRIPT: dict[str, list[tuple[int, str]]] = {
    "fine": [(200, GOOD)],
    "prose": [(200, f"Of course! Here you go: {GOOD} I hope that helps.")],
    "busy": [(429, ""), (503, ""), (200, GOOD)],
    "broken": [(500, "")],
    "six": [(200, GOOD.replace("4", "6", 1))],
    "half": [(200, GOOD.replace("4", "4.5", 1))],
    "cut": [(200, GOOD[:30]), (200, GOOD)],
    "nonsense": [(200, "I'd rather not.")],
    "refused": [(401, "")],
    "hang": [(0, "")],
    "garbled": [(200, "\0")],
}


class Hostile(ThreadingHTTPServer):
    """Counts calls by word, the keys it was shown, and the most requests that were under way at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.calls: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.now = self.most = 0
        self.lock, self.stopped = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Hostile

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = body["messages"][-1]["content"].split("Counsellor's response:")[-1]
        word = next(w for w in SCRIPT if f"word {w} " in reply)
        with self.server.lock:
            script = SCRIPT[word]
            status, text = script[min(self.server.calls[word], len(script) - 1)]
            self.server.calls[word] += 1
            self.server.keys.add(self.headers.get("Authorization", ""))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self._answer(status, text)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def _answer(self, status: int, text: str) -> None:
        if not status:
            self.server.stopped.wait(30)
            return
        usage = {"prompt_tokens": 1000, "completion_tokens": 100}
        answer = json.dumps({"choices": [{"message": {"content": text}}], "usage": usage})
        content = (answer if text != "\0" else "{not json").encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def hostile_server() -> Iterator[Hostile]:
    server = Hostile()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
