"""A stand-in for the endpoint of a second ear, over real connections; for tests only."""

from __future__ import annotations

import json
import threading
import time
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from endpoint import answering


class MadeEar(ThreadingHTTPServer):
    """Says what it is set to say, and remembers what it was asked."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.says: Any = "no"  # a text; a number is an HTTP status, bytes are the whole body
        self.replies: dict[str, str] = {}  # by a text in the question, before `says`
        self.takes_s = 0.0
        self.hangs_up = 0  # so many requests are cut off without a word
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections = self.now = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def texts(self) -> list[str]:
        """What of the last question a reader of JSON takes for the client's texts."""
        line = next(line for line in self.words.split("\n") if line.startswith("Texts: "))
        found: list[str] = json.loads(line.removeprefix("Texts: "))
        return found

    @property
    def words(self) -> str:
        """The last question."""
        [message] = self.asked[-1]["messages"]
        assert message["role"] == "user"
        return str(message["content"])


class _Handler(BaseHTTPRequestHandler):
    server: MadeEar
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            cut, self.server.hangs_up = self.server.hangs_up > 0, self.server.hangs_up - 1
        time.sleep(self.server.takes_s)
        with self.server.lock:
            self.server.now -= 1
        if cut:
            self.close_connection = True
            return
        asked = body["messages"][0]["content"]
        says = next((reply for text, reply in self.server.replies.items() if text in asked), self.server.says)
        content = (
            says if isinstance(says, bytes) else json.dumps({"choices": [{"message": {"content": says}}]}).encode()
        )
        self.send_response(says if isinstance(says, int) else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Location", "/v1/elsewhere")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


def made_ear() -> AbstractContextManager[MadeEar]:
    """The stand-in on a free port, until the block ends."""
    return answering(MadeEar())
