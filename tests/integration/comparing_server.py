"""A stand-in for an OpenAI-compatible judge that rates and compares by marks in the texts; for tests only.

A response with more `+` is better. A client who says "biased" gets whoever is shown first; "odd" no usable answer;
"moody" whoever is shown first when it is asked for the first time.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Comparing(ThreadingHTTPServer):
    """Counts calls; `marks` tells where the client, A and B (or the one response) stand in a prompt."""

    daemon_threads = True

    def __init__(self, marks: tuple[str, str, str, str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.marks, self.calls = marks, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, prompt: str) -> str:
        one, a, b, keys = self.marks
        if a not in prompt:
            plus = prompt.split(one)[1].split("\n\n")[0].count("+")
            return json.dumps(dict.fromkeys(re.search(keys, prompt)[1].split(", "), plus))
        first, second = prompt.split(a)[1].split(b)
        first, second = first.count("+"), second.split("\n\n")[0].count("+")
        if "biased" in prompt or ("moody" in prompt and self.calls.count(prompt) == 1):
            return "A"
        if "odd" in prompt:
            return "Both have their merits."
        return "A" if first > second else "B" if second > first else "tie"


class _Handler(BaseHTTPRequestHandler):
    server: Comparing

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        self.server.calls.append(prompt)
        answer = {"choices": [{"message": {"content": self.server.answer(prompt)}}], "usage": {}}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def comparing_server(one: str, a: str, b: str, keys: str) -> Iterator[Comparing]:
    server = Comparing((one, a, b, keys))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
