"""An OpenAI-compatible endpoint inside a benchmark's own process, which counts every call that reaches it.

    with served(lambda model, prompt: "a reply", latency=0.2) as endpoint:
        ...                               # give endpoint.url to a judge or a responder
        endpoint.calls["model"]           # a Counter over prompts

`judge_reader(rubric)` reads the conversation and the response back out of a judge's prompt, so that an endpoint can
rate by whatever it likes. No benchmark by itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar

from psyray.rubric import Rubric

Say = Callable[[str, str], str]  # (model, prompt) -> answer
Server = TypeVar("Server", bound=ThreadingHTTPServer)


class Endpoint(ThreadingHTTPServer):
    """Answers by `say`; `calls` holds for each model how often each prompt came, `came` when first."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, say: Say, latency: float, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.say, self.latency, self.lock = say, latency, threading.Lock()
        self.reset()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def reset(self) -> None:
        """Count anew."""
        self.calls: dict[str, Counter[str]] = defaultdict(Counter)
        self.came: list[tuple[float, str]] = []  # (Unix seconds, model)

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: a client that is killed leaves its connections behind."""


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model, prompt = body["model"], "\n".join(m["content"] for m in body["messages"])
        with self.server.lock:
            if not self.server.calls[model][digest(prompt)]:
                self.server.came.append((time.time(), model))
            self.server.calls[model][digest(prompt)] += 1
        time.sleep(self.server.latency)
        text = self.server.say(model, prompt)
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4}
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        content = json.dumps({"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


def served(say: Say, latency: float = 0.0, port: int = 0) -> AbstractContextManager[Endpoint]:
    """The endpoint on a port (0: a free one), until the block ends."""
    return answering(Endpoint(say, latency, port))


@contextmanager
def answering(server: Server) -> Iterator[Server]:
    """A server that answers in threads of this process, until the block ends."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def digest(text: str) -> str:
    """A text's hash in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def judge_reader(rubric: Rubric) -> Callable[[str], tuple[str, str]]:
    """(conversation, response) as a pointwise prompt of the rubric shows them; ValueError for any other prompt."""
    marks = {"conversation": "@conversation@", "response": "@response@"}
    shown = rubric.question([{"role": "user", "content": marks["conversation"]}], marks["response"])[0]["content"]
    pattern = re.escape(shown)
    for name, mark in marks.items():
        pattern = pattern.replace(re.escape(mark), f"(?P<{name}>.*)")
    whole = re.compile(pattern, re.DOTALL)

    def read(prompt: str) -> tuple[str, str]:
        found = whole.fullmatch(prompt)
        if not found:
            raise ValueError("the prompt is not the rubric's")
        return found["conversation"], found["response"]

    return read
