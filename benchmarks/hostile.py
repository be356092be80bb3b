"""Malformed and hostile requests against a served run: no answer of the 500s, nothing of one key told to another.

    python benchmarks/hostile.py                     # 10,000 requests, tiny random models; some minutes
    python benchmarks/hostile.py --requests 500

A third come from schemathesis, which reads the port's OpenAPI description and makes requests that fit it and requests
that do not; the others from lists of our own: every field of every route with values that are out of bounds, of other
types or of odd letters; bodies that are no JSON, too deep or too large; odd paths, methods and headers; and bytes that
are no HTTP. Meanwhile a second key asks for chats and scores that hold a canary, under request ids that the attackers
use as well. Exit status 1 where an answer is a 5xx or none, where a refusal repeats the client's words, where the
canary is told to the other key, or where the second key's own answers change. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from serve.chat import ChatRequest
from serve.ingress import description

MARK = f"mark-{secrets.token_hex(8)}"  # stands in attackers' texts: no refusal may repeat it
CANARY = f"canary-{secrets.token_hex(8)}"  # stands in the second key's texts
IDS = [f"request-{number}" for number in range(8)]  # that all share
TIMEOUT_S = 120
CHAT, BEST, SCORE = "/v1/chat/completions", "/v1/chat/best", "/reward/score"
SAID = {"role": "user", "content": f"{MARK} The flat is too quiet."}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 17, 1.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 2**31,
    2**63, -(2**63) - 1, 10**400, "", " ", "1", "-1", "1e999", "null", MARK, "\x00", "\ud800", "\u202e\u200b\ufeff",
    "é" * 70_000, "😀" * 20_000, "<|im_end|>", "{{ 7 * 7 }}", "../../etc/passwd", "' OR 1=1 --", [], [[]], [None],
    [MARK] * 300, {}, {"": ""}, {"odd key": MARK}, {"\ud800": 1}, [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}],
    [{"role": "assistant", "content": "x"}], [{"role": "user", "content": "\ud83d"}], [SAID] * 65, [[SAID]],
    [{"role": "user", "content": "a " * 7_900}],
)  # fmt: skip
UNKNOWN = (
    "tools", "tool_choice", "functions", "response_format", "guided_regex", "structured_outputs", "logit_bias",
    "chat_template", "chat_template_kwargs", "documents", "mm_processor_kwargs", "request_id", "cache_salt", "priority",
    "prompt_logprobs", "min_tokens", "ignore_eos", "best_of", "use_beam_search", "kv_transfer_params", "vllm_xargs",
    "stop_token_ids", "allowed_token_ids", "bad_words", "truncate_prompt_tokens", "echo", "__proto__", "__class__",
    "odd key",
)  # fmt: skip
HEADERS: tuple[dict[str, str | bytes], ...] = (
    {"Accept-Language": "q=" + "9" * 5000}, {"Accept-Language": "de;q=\xb2"}, {"Accept-Language": ",;" * 4000},
    {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data"}, {"Content-Type": "application/x-www-form"},
    {"Content-Type": "application/json; charset=utf-16"}, {"Content-Encoding": "gzip"}, {"X-Request-Id": IDS[0]},
    {"X-Request-Id": "x" * 4000}, {"X-data-parallel-rank": "999"}, {"X-data-parallel-rank": "-1e9"},
    {"traceparent": "00-zz-zz-zz"}, {"Accept": "application/xml"}, {"Range": "bytes=0-1"}, {"Origin": "null"},
    {"X-Forwarded-For": "127.0.0.1, " * 200}, {"Host": "evil.example"}, {"Cookie": "a=" + "b" * 4000},
    {"Expect": "100-continue"}, {"serve_multiplexed_model_id": "x:y"}, {"serve_session_id": "\xff\xfe"},
    {"Authorization": "Bearer \xff\xfe"}, {"Authorization": "Bearer " + "x" * 8000}, {"X-HTTP-Method-Override": "PUT"},
    {"X-Request-Id": "\xff"}, {"X-Request-Id": ""}, {"x-session-id": "\xff"}, {"serve_multiplexed_model_id": "\xff"},
    {"Serve-Multiplexed-Model-Id": "\xff"}, {"X-Request-Timeout-Seconds": "\xff"}, {"X-Request-Timeout-Seconds": "0"},
    {"X-Request-Timeout-Seconds": "0.001"}, {"X-Request-Timeout-Seconds": "nan"}, {"X-Session-Id": "x" * 4000},
    {"X-Request-Disconnect-Disabled": "\xff"}, {"X-Request-Disconnect-Disabled": "?1"},
)  # fmt: skip
BODIES = (
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe\x00", b"{" * 50_000, b"[" * 100_000, b'{"a":' * 20_000,
    b'{"messages": NaN}', b'{"messages": [], "messages": 3}', b"\xef\xbb\xbf{}", b'{"n": ' + b"9" * 5000 + b"}",
    b'{"items": ' + b"[" * 900 + b"]" * 900 + b"}", b" " * 4_100_000, b'{"messages":"' + b"x" * 4_100_000 + b'"}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"\\ud800": 1}', b"\x00" * 1000,
)  # fmt: skip
PATHS = (
    "/", "//", "/v1", "/v1/models/", "/v1/models/champion/..", "/v1/models/%00", "/v1/models/%ff%fe", "/v1/completions",
    "/v1/models/" + "a" * 6000, "/reward", "/metrics", "/docs", "/-/routes/x", "/experts/next", "/v1/embeddings",
    "/tokenize", "/collective_rpc", "/load_lora_adapter", "/v1/load_lora_adapter", "/%2e%2e/etc/passwd",
    "/openapi.json", "/v1/chat/completions/", "/v1/chat/completions?model[]=x", "/reward/score?" + "a=b&" * 1500,
    "/é", "/healthz/x",
)  # fmt: skip
RAW = (
    b"GET", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n",
    b"FOO /v1/models HTTP/1.1\r\n\r\n",
    b"POST /reward/score HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /reward/score HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    b"POST /reward/score HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    b"POST /reward/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /reward/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 200_000 + b"\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-\xff: b\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Request-Id: ok\r\nX-Request-Id: \xff\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: a\r\n b\x00c\r\n\r\n", b"GET http://evil.example/ HTTP/1.1\r\n\r\n",
)  # fmt: skip

# Hypothesis moves the interpreter's recursion limit, which fails what another thread parses meanwhile.
ONE_AT_A_TIME = threading.Lock()


@dataclass
class Report:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, what: str, status: int, text: str) -> None:
        """Look at one answer."""
        self.statuses[status] += 1
        if status >= 500 or status < 200:
            self.wrong.append(f"{status}: {what}")
        if CANARY in text:
            self.wrong.append(f"told the other key's words: {what}")
        if status >= 400 and MARK in text:
            self.wrong.append(f"a refusal repeats the client's words: {what}")


@dataclass(frozen=True)
class Strike:
    """One request of our own lists; `body` is JSON or bytes."""

    what: str
    method: str
    path: str
    body: Any = None
    headers: dict[str, Any] = field(default_factory=dict)


def good(path: str) -> dict[str, Any]:
    """A request that the route answers."""
    if path == SCORE:
        return {"items": [{"messages": [SAID], "response": f"{MARK} That sounds lonely."}]}
    return {"messages": [SAID], "max_tokens": 4, **({"of": 2} if path == BEST else {})}


def strikes() -> Iterator[Strike]:
    """Every request of our own lists once."""
    fields = (*ChatRequest.model_fields, *UNKNOWN)
    for path, names in ((CHAT, fields), (BEST, (*fields, "of", "caution")), (SCORE, ("items", *UNKNOWN))):
        for name in names:
            for place, value in enumerate(VALUES):
                yield Strike(f"{path} {name} value {place}", "POST", path, {**good(path), name: value})
        for place, body in enumerate(BODIES):
            yield Strike(f"{path} body {place}", "POST", path, body)
        for place, headers in enumerate(HEADERS):
            yield Strike(f"{path} headers {place}", "POST", path, good(path), headers)
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "FOO"):
            yield Strike(f"{method} {path}", method, path)
    for place, value in enumerate(VALUES):
        for key in ("messages", "response", "odd key"):
            yield Strike(
                f"items.{key} value {place}", "POST", SCORE, {"items": [{**good(SCORE)["items"][0], key: value}]}
            )
        for key in ("role", "content", "name", "tool_calls"):
            yield Strike(f"messages.{key} value {place}", "POST", CHAT, {"messages": [{**SAID, key: value}]})
    for place, path in enumerate(PATHS):
        for method in ("GET", "POST"):
            yield Strike(f"{method} path {place}", method, path)


class Attacker:
    """One thread's session with the key that attacks."""

    def __init__(self, url: str, token: str, report: Report) -> None:
        self.url, self.report, self.session = url, report, requests.Session()
        self.session.trust_env = False  # no proxy of the environment comes between
        self.session.headers["Authorization"] = f"Bearer {token}"

    def strike(self, strike: Strike, dice: random.Random) -> None:
        """Send one of our own."""
        body = strike.body
        headers: dict[str, Any] = {"Content-Type": "application/json", "X-Request-Id": dice.choice(IDS)}
        headers |= {name: v.encode("latin-1") if isinstance(v, str) else v for name, v in strike.headers.items()}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            reply = self.session.request(
                strike.method, self.url + strike.path, data=data, headers=headers, timeout=TIMEOUT_S
            )
        except requests.ConnectionError:
            # The server may hang up on a body that is too large before it has read all of it; else it must answer.
            status = 413 if data and len(data) > 4_000_000 else 0
            self.report.note(strike.what, status, "")
            return
        self.report.note(strike.what, reply.status_code, reply.text)

    def fuzz(self, count: int, seed: int) -> None:
        """As many requests by schemathesis, half of them such as fit the description."""
        import hypothesis
        import schemathesis
        from hypothesis import strategies
        from schemathesis.generation import GenerationMode

        schema = schemathesis.openapi.from_dict(description())
        operations = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
        settings = hypothesis.settings(
            max_examples=max(count // 2, 1),
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            cases = strategies.one_of(*(operation.as_strategy(generation_mode=mode) for operation in operations))
            with ONE_AT_A_TIME:
                hypothesis.seed(seed)(settings(hypothesis.given(case=cases)(self._sender(mode.value))))()

    def _sender(self, mode: str) -> Callable[[Any], None]:
        def send(case: Any) -> None:
            what = f"{mode} {case.method} {case.path} {case.body!r:.300}"
            reply = case.call(base_url=self.url, session=self.session, timeout=TIMEOUT_S)
            self.report.note(what, reply.status_code, reply.text)

        return send


def raw(url: str, report: Report) -> None:
    """Bytes that are no HTTP: whatever comes back is no 5xx, and the server goes on."""
    place = urlsplit(url)
    for number, data in enumerate(RAW):
        with socket.create_connection((place.hostname, place.port), timeout=10) as line:
            line.settimeout(2)
            try:
                line.sendall(data)
                line.shutdown(socket.SHUT_WR)
                reply = line.recv(65536)
            except OSError:  # hanging up, or saying nothing to half a request, is an answer too
                reply = b""
        words = reply.split(b" ", 2)
        status = int(words[1]) if reply.startswith(b"HTTP/") and words[1].isdigit() else 400
        report.note(f"bytes {number}", status, reply.decode(errors="replace"))


class Neighbour(threading.Thread):
    """The second key: asks the same again and again, and must be told the same."""

    def __init__(self, url: str, token: str, report: Report) -> None:
        super().__init__(daemon=True)
        self.url, self.report, self.stop_now = url, report, threading.Event()
        self.session, self.asked = requests.Session(), 0
        self.session.trust_env = False
        self.session.headers["Authorization"] = f"Bearer {token}"

    def ask(self) -> tuple[str, float]:
        """The answer to a chat and the score of a response, both with the canary."""
        said: Any = [{"role": "user", "content": f"{CANARY} The flat is too quiet."}]
        headers = {"X-Request-Id": IDS[self.asked % len(IDS)]}
        self.asked += 1
        chat: Any = {"messages": said, "temperature": 0, "max_tokens": 12}
        told = self.session.post(self.url + CHAT, json=chat, headers=headers, timeout=TIMEOUT_S)
        item = {"messages": said, "response": f"{CANARY} That sounds lonely."}
        scored = self.session.post(self.url + SCORE, json={"items": [item]}, headers=headers, timeout=TIMEOUT_S)
        if {told.status_code, scored.status_code} != {200}:
            self.report.wrong.append(f"the second key got {told.status_code} and {scored.status_code}")
            return "", 0.0
        return told.json()["choices"][0]["message"]["content"], scored.json()["scores"][0]["score"]

    def run(self) -> None:
        answer, score = self.ask()
        while not self.stop_now.is_set():
            again, scored = self.ask()
            # In bfloat16 the shape of a batch moves the last digits.
            if MARK in again or abs(scored - score) > 0.25 or again != answer:
                self.report.wrong.append(f"the second key's answers changed: {again!r:.80}, {score} and {scored}")


def attack(url: str, tokens: Sequence[str], count: int, *, threads: int = 4, seed: int = 0) -> Report:
    """About `count` requests of the first key while the second asks its own; what came back."""
    report, dice = Report(), random.Random(seed)
    neighbour = Neighbour(url, tokens[1], report)
    neighbour.start()
    ours = list(strikes())
    dice.shuffle(ours)
    wanted = count - count // 3 - len(RAW)
    chosen = [ours[number % len(ours)] for number in range(max(wanted, 0))]

    def work(number: int) -> None:
        attacker, own = Attacker(url, tokens[0], report), random.Random(f"{seed}/{number}")
        for strike in chosen[number::threads]:
            attacker.strike(strike, own)
        attacker.fuzz(count // 3 // threads, seed * 1000 + number)

    try:
        raw(url, report)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
        raw(url, report)
    finally:
        neighbour.stop_now.set()
        neighbour.join(TIMEOUT_S)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from made_champion import FIRST, SECOND, made_run, up

    from psyray.sections.data import EngineSection

    # In bfloat16 the second key's answers would depend on who shares its batch.
    engine = EngineSection(max_model_len=256, max_num_seqs=64, kv_cache_gib=1, dtype="float32")
    with tempfile.TemporaryDirectory() as place, up(made_run(Path(place), tiny=True, engine=engine)) as url:
        report = attack(url, (FIRST, SECOND), given.requests, threads=given.threads, seed=given.seed)
    for line in report.wrong[:50]:
        print(line, file=sys.stderr)
    statuses = {str(status): count for status, count in sorted(report.statuses.items())}
    print(json.dumps({"requests": report.statuses.total(), "statuses": statuses, "wrong": len(report.wrong)}))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
