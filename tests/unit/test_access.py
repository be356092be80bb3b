"""Who may ask, how often and how much: keys, roles, rates and sizes in front of a stand-in application."""

import asyncio
import hashlib
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.testclient import TestClient

from psyray.errors import PsyrayError
from serve.access import Gate, Limits, Rate, parse_keys, read_keys, role_of

TALKER, SCORER, BOSS = "talk-" + "a" * 20, "score-" + "b" * 20, "boss-" + "c" * 20
KEYS = parse_keys([f"ann chat {TALKER}", "", "# a program", f"bot score,chat {SCORER}", f"root admin {BOSS}"], "keys")


class Body(BaseModel):
    words: str


def client(keys=KEYS, **limits) -> TestClient:
    app = FastAPI()
    app.add_middleware(Gate, keys=keys, limits=Limits(**limits))

    @app.post("/v1/chat")
    async def chat(body: Body, request: Request) -> dict:
        return {"who": request.scope["psyray.key"], "length": len(body.words)}

    @app.get("/reward/score")
    @app.get("/healthz")
    @app.get("/metrics")
    async def open_book() -> dict:
        return {}

    return TestClient(app)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_key_opens_what_its_roles_say_and_refusals_tell_nothing():
    asked = client()
    assert asked.post("/v1/chat", json={"words": "hi"}, headers=bearer(TALKER)).json() == {"who": "ann", "length": 2}
    for header in ({}, bearer("wrong" * 8), {"Authorization": f"Basic {TALKER}"}, {"Authorization": TALKER}):
        refused = asked.post("/v1/chat", json={"words": "hi"}, headers=header)
        assert (refused.status_code, refused.json()["error"]["message"]) == (401, "unauthorized")
        assert refused.headers["WWW-Authenticate"] == "Bearer"
    forbidden = asked.get("/reward/score", headers=bearer(TALKER))
    assert (forbidden.status_code, forbidden.json()["error"]["message"]) == (403, "forbidden")
    assert asked.get("/reward/score", headers=bearer(SCORER)).status_code == 200
    assert asked.get("/metrics", headers=bearer(SCORER)).status_code == 403
    assert asked.get("/metrics", headers=bearer(BOSS)).status_code == 200
    assert asked.get("/healthz").status_code == 200


def test_what_is_no_http_is_refused():
    async def app(scope, receive, send):
        raise AssertionError("let in")

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Gate(app, (), Limits())({"type": "websocket", "path": "/healthz", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_paths_that_nobody_named_are_the_admins():
    assert [role_of(path) for path in ("/v1/models", "/reward/score", "/experts/next", "/turns/say", "/docs", "/")] == [
        "chat", "score", "annotate", "compare", "admin", "admin"
    ]  # fmt: skip


def test_without_keys_anyone_may_ask_within_the_limits():
    asked = client(keys=(), per_minute=2)
    assert [asked.get("/reward/score").status_code for _ in range(3)] == [200, 200, 429]


def test_a_key_that_asks_too_often_waits_and_holds_nobody_else():
    asked = client(per_minute=2)
    codes = [asked.get("/reward/score", headers=bearer(SCORER)).status_code for _ in range(3)]
    assert codes == [200, 200, 429]
    refused = asked.get("/reward/score", headers=bearer(SCORER))
    assert 1 <= int(refused.headers["Retry-After"]) <= 30
    assert asked.get("/reward/score", headers=bearer(BOSS)).status_code == 200


def test_a_rate_refills_evenly_and_a_refusal_costs_nothing():
    now = [0.0]
    rate = Rate(6, lambda: now[0])
    assert [rate.wait("a") for _ in range(6)] == [0] * 6
    assert rate.wait("a") == pytest.approx(10) == rate.wait("a")
    now[0] = 9.5
    assert rate.wait("a") == pytest.approx(0.5)
    now[0] = 10
    assert rate.wait("a") == 0 and rate.wait("a") == pytest.approx(10) and rate.wait("b") == 0
    now[0] = 1000
    assert [rate.wait("a") for _ in range(6)] == [0] * 6 and rate.wait("a") > 0


def test_a_body_that_is_too_large_is_refused_whatever_its_header_says():
    asked = client(body_bytes=1000)
    long = b'{"words": "' + b"x" * 2000 + b'"}'
    assert asked.post("/v1/chat", content=long, headers=bearer(TALKER)).status_code == 413

    def in_pieces():
        for start in range(0, len(long), 100):
            yield long[start : start + 100]

    refused = asked.post("/v1/chat", content=in_pieces(), headers=bearer(TALKER) | {"Content-Type": "application/json"})
    assert refused.status_code == 413


def test_one_request_too_many_at_once_is_told_to_come_back():
    async def app(scope, receive, send):
        started.set()
        await go_on.wait()

    async def both() -> list[dict]:
        gate, sent = Gate(app, (), Limits(in_flight=1)), []
        scope = {"type": "http", "path": "/v1/chat", "headers": []}

        async def send(message):
            sent.append(message)

        first = asyncio.create_task(gate(scope, None, send))
        await started.wait()
        await gate(scope, None, send)
        go_on.set()
        await first
        assert gate.under_way.total() == 0
        return sent

    started, go_on = asyncio.Event(), asyncio.Event()
    refused, _ = asyncio.run(both())
    assert refused["status"] == 503 and (b"retry-after", b"1") in refused["headers"]


def test_one_key_leaves_half_of_the_places_to_others():
    async def app(scope, receive, send):
        await go_on.wait()

    async def ask(gate, token) -> list[dict]:
        sent = []

        async def send(message):
            sent.append(message)

        await gate({"type": "http", "path": "/v1/chat", "headers": [(b"authorization", token.encode())]}, None, send)
        return sent

    async def all_of_them() -> list[list[dict]]:
        gate = Gate(app, KEYS, Limits(in_flight=4))
        asked = [asyncio.create_task(ask(gate, f"Bearer {token}")) for token in (TALKER, TALKER, TALKER, SCORER)]
        await asyncio.sleep(0)
        go_on.set()
        done = await asyncio.gather(*asked)
        assert gate.under_way.total() == 0
        return [*done, await ask(gate, f"Bearer {TALKER}")]

    go_on = asyncio.Event()
    first, second, third, other, later = asyncio.run(all_of_them())
    assert first == second == other == later == []  # let in: the application has the say
    assert third[0]["status"] == 429 and (b"retry-after", b"1") in third[0]["headers"]
    assert Limits(in_flight=1).of_one_key == 1


def test_a_body_that_does_not_come_is_a_408_and_a_long_answer_is_not():
    pieces = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive():
        if pieces:
            return pieces.pop(0)
        await asyncio.sleep(60)

    async def answers(app) -> list[dict]:
        sent = []

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", f"Bearer {TALKER}".encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat", "query_string": b"", "headers": headers}
        await asyncio.wait_for(app(scope, receive, send), 20)
        return sent

    start, *_ = asyncio.run(answers(client(body_s=0.05).app))
    assert start["status"] == 408 and (b"connection", b"close") in start["headers"]

    async def slow(scope, receive, send):
        assert not (await receive())["more_body"]
        with pytest.raises(TimeoutError):  # nobody goes away, and nothing ends the wait for it
            await asyncio.wait_for(receive(), 0.2)

    pieces.append({"type": "http.request", "body": b"{}", "more_body": False})
    assert asyncio.run(answers(Gate(slow, KEYS, Limits(body_s=0.05)))) == []


def test_keys_come_from_a_file_or_the_environment_and_only_hashes_are_kept(tmp_path: Path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"ann chat {TALKER}\n")
    monkeypatch.setenv("PSYRAY_KEYS", f"bot score {SCORER};root admin {BOSS}")
    assert [key.name for key in read_keys(file)] == ["ann"] and [key.name for key in read_keys(None)] == ["bot", "root"]
    assert read_keys(file)[0].digest == hashlib.sha256(TALKER.encode()).digest() and TALKER not in repr(read_keys(file))
    monkeypatch.delenv("PSYRAY_KEYS")
    assert read_keys(None) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ann chat", "line 1: expected NAME ROLE.* found 2 words"),
        (f"\nann talk {TALKER}", "line 2: unknown role 'talk' of ann; roles are chat, score"),
        ("ann chat short-secret", "line 1: the token of ann is shorter than 16"),
        (f"ann chat {TALKER}\nbob chat {TALKER}", "line 2: bob or its token is there twice"),
        ("# nobody", "holds no key"),
    ],
)
def test_a_wrong_line_is_named_and_its_token_is_not(tmp_path: Path, text: str, words: str):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(PsyrayError, match=words) as caught:
        read_keys(file)
    assert TALKER not in str(caught.value) and "short-secret" not in str(caught.value)
    with pytest.raises(PsyrayError, match="no file of keys at"):
        read_keys(tmp_path / "none")
