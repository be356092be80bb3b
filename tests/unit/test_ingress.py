"""The port without Ray: who is asked, what becomes of odd requests, and of parts that fail."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from made_ear import MadeEar, made_ear
from ray.exceptions import RayError
from starlette.testclient import TestClient

from serve.access import Limits, parse_keys
from serve.champion import Policy
from serve.chat import Refusal
from serve.ear import Ask, Ear
from serve.guard import crisis_hits, read_replies
from serve.health import Health
from serve.ingress import Ingress, description, http_app
from serve.lineup import BASE, Lineup, Scoring, Served
from serve.reward import Score
from serve.transcript import Transcript

CLIENT = {"role": "user", "content": "The flat is too quiet."}
TOKENS = {"ann": "ann-" + "a" * 20, "bob": "bob-" + "b" * 20}


class MadePieces:
    """A stand-in for the answer that Serve's handle gives: its pieces, and a way to end the work on them."""

    def __init__(self, pieces: AsyncIterator[str | Refusal], cancel: Callable[[], None]) -> None:
        self.pieces, self.cancel = pieces, cancel

    def __aiter__(self) -> MadePieces:
        return self

    async def __anext__(self) -> str | Refusal:
        return await anext(self.pieces)


class MadeEngine:
    """A stand-in for an engine's handle: says what it was asked, as an engine would."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.says: list[str | Refusal | Exception | float] | None = None  # a number: seconds that it is silent
        self.meanwhile: Callable[[], None] = lambda: None
        self.cancelled = 0
        self.answer = SimpleNamespace(remote=lambda tree, name: MadePieces(self.reply(tree, name), self.cancel))

    def cancel(self) -> None:
        self.cancelled += 1

    async def reply(self, tree: dict[str, Any], name: str) -> AsyncIterator[str | Refusal]:
        self.asked.append(tree)
        self.meanwhile()
        message = {"role": "assistant", "content": "I see."}
        whole = {"model": name, "choices": [{"index": i, "message": message} for i in range(tree.get("n", 1))]}
        for piece in self.says or [json.dumps(whole)]:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                yield piece


class MadeReward:
    """A stand-in for the reward model's handle: scores by length."""

    def __init__(self) -> None:
        self.score = SimpleNamespace(remote=self.reply)

    async def reply(self, items: list[Any]) -> list[Score]:
        return [Score(score=float(len(item.response)), spread=0.5) for item in items]


class MadeCounter:
    """A stand-in for Ray's counter: how often, by the values of its labels."""

    def __init__(self, *labels: str) -> None:
        self.labels, self.counted = labels, Counter[tuple[str, ...]]()

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        tags = tags or {}
        assert set(tags) == set(self.labels)
        self.counted[tuple(tags[label] for label in self.labels)] += int(value)


@pytest.fixture
def engine() -> MadeEngine:
    return MadeEngine()


@pytest.fixture
def routes(engine: MadeEngine) -> Ingress:
    """The port's routes over a champion of one engine and an adapter on it."""
    routes = object.__new__(Ingress)
    policy = Policy(name="psyray-round-2", path="p", round=2, system="Be kind.", temperature=0.5)
    warm = policy.model_copy(update={"name": "warm"})
    models = (Served(policy, "export2", "app.policy.x", BASE), Served(warm, "stage7", "app.policy.x", "warm"))
    routes.lineup = Lineup(models, Scoring("scorer", "export1", "app.reward.y"), ())
    routes.limits = Limits(messages=5, tokens=400)
    routes.replies, routes.timeout_s = read_replies(None), 5.0
    routes.transcript = None
    routes.ear = None
    routes.crises = MadeCounter("kind", "guard", "by")  # type: ignore[assignment]
    routes.heard = MadeCounter("answer")  # type: ignore[assignment]
    routes.health = Health(routes._check, beside=routes._beside)
    routes._handles = {("app.policy.x", True): engine, ("app.reward.y", False): MadeReward()}  # type: ignore[dict-item]
    return routes


@pytest.fixture
def port(routes: Ingress) -> TestClient:
    """The application over these routes."""
    keys = parse_keys([f"{name} chat,score {token}" for name, token in TOKENS.items()], "keys")
    # What is raised past the application would be a 500.
    return TestClient(http_app(routes, keys, routes.limits), headers=bearer("ann"), raise_server_exceptions=False)


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[name]}"}


def chat(port: TestClient, **body: Any) -> Any:
    return port.post("/v1/chat/completions", json={"messages": [CLIENT], **body})


def test_the_model_of_a_request_says_who_answers(port: TestClient, engine: MadeEngine) -> None:
    for asked, name, called, export in (
        (None, "psyray-round-2", BASE, "export2"),
        ("champion", "psyray-round-2", BASE, "export2"),
        ("warm", "warm", "warm", "stage7"),
    ):
        reply = chat(port, model=asked)
        assert (reply.status_code, reply.json()["model"], reply.headers["X-Psyray-Id"]) == (200, name, export)
        assert engine.asked[-1]["model"] == called and engine.asked[-1]["messages"][0]["content"] == "Be kind."
    missing = chat(port, model="somebody's words")
    assert missing.status_code == 404 and "somebody" not in missing.text and "warm" in missing.text
    assert [m["id"] for m in port.get("/v1/models").json()["data"]] == ["champion", "psyray-round-2", "warm"]


def test_what_one_key_asks_leaves_no_trace_for_another(port: TestClient, engine: MadeEngine) -> None:
    same = {"X-Request-Id": "one-and-the-same"}
    for name in ("ann", "bob"):
        port.post("/v1/chat/completions", json={"messages": [CLIENT]}, headers=bearer(name) | same)
    first, second = engine.asked
    assert first["request_id"] != second["request_id"] and "one-and-the-same" not in str(engine.asked)
    assert (first["cache_salt"], second["cache_salt"]) == ("ann", "bob")
    assert TOKENS["ann"] not in str(engine.asked)


def test_streams_are_passed_on_as_they_come(port: TestClient, engine: MadeEngine) -> None:
    engine.says = ['data: {"a": 1}\n\n', "data: [DONE]\n\n"]
    reply = chat(port, stream=True)
    assert reply.text == 'data: {"a": 1}\n\ndata: [DONE]\n\n'
    assert reply.headers["content-type"].startswith("text/event-stream")


def test_a_stream_that_stands_still_ends_without_its_done_and_its_work_too(
    port: TestClient, engine: MadeEngine, routes: Ingress
) -> None:
    routes.timeout_s = 0.2
    engine.says = ["data: 1\n\n", 0.1, "data: 2\n\n", 0.15, "data: 3\n\n", 30.0, "data: [DONE]\n\n"]
    assert chat(port, stream=True).text == "data: 1\n\ndata: 2\n\ndata: 3\n\n" and engine.cancelled == 1
    for stream in (True, False):  # or before its first piece
        engine.says, engine.cancelled = [30.0], 0
        assert chat(port, stream=stream).status_code == 503 and engine.cancelled == 1


def test_a_part_that_fails_is_a_503_to_come_back_after(port: TestClient, engine: MadeEngine) -> None:
    engine.says = [RayError("died")]
    lost = chat(port)
    assert (lost.status_code, lost.headers["Retry-After"]) == (503, "1") and "died" not in lost.text
    engine.says = [Refusal(400, "longer than the context")]
    refused = chat(port)
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "longer than the context")


def test_the_best_is_picked_by_the_reward_model(port: TestClient) -> None:
    reply = port.post("/v1/chat/best", json={"messages": [CLIENT], "of": 3, "stream": True})
    assert reply.status_code == 200 and len(reply.json()["choices"]) == 1
    assert len(reply.json()["best_of"]["considered"]) == 3 and reply.json()["best_of"]["by"] == "scorer"


def test_a_reward_model_that_is_changed_while_answers_are_written_is_not_asked(
    port: TestClient, engine: MadeEngine, routes: Ingress
) -> None:
    def change() -> None:  # as the port does when the keeper has another line-up
        routes.lineup = replace(routes.lineup, reward=Scoring("next scorer", "export3", "app.reward.z"))
        gone, there = ("app.reward.y", False), ("app.reward.z", False)
        routes._handles = {("app.policy.x", True): engine, gone: None, there: MadeReward()}  # type: ignore[dict-item]

    engine.meanwhile = change
    reply = port.post("/v1/chat/best", json={"messages": [CLIENT], "of": 2})
    assert (reply.status_code, reply.json()["best_of"]["by"]) == (200, "next scorer")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat/best", "/reward/score"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"items": [{"messages": [{"role": "user", "content": "\\ud800"}], "response": "x"}]}',
        b'{"messages": NaN, "items": Infinity}',
    ],
    ids=range(10),
)
def test_odd_bodies_are_refused(port: TestClient, path: str, body: bytes) -> None:
    reply = port.post(path, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= reply.status_code < 500, reply.text


@pytest.mark.parametrize("value", [b"de;q=\xb2", b"en;q=" + b"9" * 5000, b",;" * 2000, b"\xff", b"de;q=0.5;x"])
def test_odd_languages_get_some_reply(port: TestClient, value: bytes) -> None:
    crisis = {"messages": [{"role": "user", "content": "I want to kill myself."}]}
    reply = port.post("/v1/chat/completions", json=crisis, headers={b"accept-language": value})  # type: ignore[arg-type]
    assert (reply.status_code, reply.headers["X-Psyray-Crisis"]) == (200, "true")


def test_health_names_nobody_and_asks_the_engine_once_for_a_flood(port: TestClient, routes: Ingress) -> None:
    asked = []

    async def check() -> None:
        asked.append(1)

    handle = SimpleNamespace(check_health=SimpleNamespace(remote=check))
    routes._handles["app.policy.x", False] = handle  # type: ignore[assignment]
    replies = [port.get("/healthz", headers={"Authorization": ""}) for _ in range(20)]
    assert {(r.status_code, r.text) for r in replies} == {(200, '{"status":"ok"}')} and asked == [1]


def test_what_is_refused_while_it_comes_is_told_in_openais_format(port: TestClient) -> None:
    pieces = (b" " * 1_000_000 for _ in range(5))
    reply = port.post("/v1/chat/completions", content=pieces, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["message"]) == (413, "the request is too large")


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        ("/v1/chat/completions", {"messages": [CLIENT] * 6}, "messages: 6 messages; at most 5"),
        ("/v1/chat/completions", {"max_tokens": 401}, "max_tokens: 401 new tokens over all answers; at most 400"),
        ("/v1/chat/completions", {"max_tokens": 1, "max_completion_tokens": 401}, "401 new tokens"),
        ("/v1/chat/completions", {"n": 5}, "480 new tokens"),  # of 96 each, the policy's own
        ("/v1/chat/best", {"of": 5, "max_tokens": 81}, "405 new tokens"),
        ("/v1/chat/best", {"of": 5, "n": 1}, "480 new tokens"),
        ("/v1/chat/best", {"of": 2, "temperature": 0}, "temperature: at 0 all 2 answers are the same one; ask for one"),
        ("/v1/chat/completions", {"n": 3, "temperature": 0.0}, "temperature: at 0 all 3 answers are the same one"),
    ],
)
def test_a_request_is_bounded_by_what_it_asks_for(
    port: TestClient, engine: MadeEngine, path: str, more: dict[str, Any], words: str
) -> None:
    reply = port.post(path, json={"messages": [CLIENT], **more})
    assert reply.status_code == 422 and words in reply.json()["error"]["message"] and engine.asked == []


def test_several_answers_of_a_policy_that_is_served_at_temperature_0_need_one_of_their_own(
    port: TestClient, routes: Ingress
) -> None:
    cold = [replace(one, policy=one.policy.model_copy(update={"temperature": 0.0})) for one in routes.lineup.models]
    routes.lineup = replace(routes.lineup, models=tuple(cold))
    refused, best = ({"messages": [CLIENT], "of": 2, **more} for more in ({}, {"temperature": 0.8}))
    assert port.post("/v1/chat/best", json=refused).status_code == 422
    assert port.post("/v1/chat/best", json=best).status_code == chat(port).status_code == 200


def test_the_bounds_themselves_are_taken(port: TestClient) -> None:
    assert chat(port, messages=[CLIENT] * 5, max_tokens=100, n=4).status_code == 200
    items = [{"messages": [CLIENT] * said, "response": "x"} for said in (5, 6)]
    assert port.post("/reward/score", json={"items": items[:1]}).status_code == 200
    refused = port.post("/reward/score", json={"items": items})
    assert refused.status_code == 422
    assert refused.json()["detail"] == [{"loc": ["body", "items", 1, "messages"], "msg": "6 messages; at most 5"}]


def test_each_answer_counts_against_the_rate_of_its_key(routes: Ingress) -> None:
    keys = parse_keys([f"ann chat {TOKENS['ann']}", f"bob chat {TOKENS['bob']}"], "keys")
    routes.limits = Limits(per_minute=8)
    port = TestClient(http_app(routes, keys, routes.limits), headers=bearer("ann"))
    best = {"messages": [CLIENT], "of": 4}
    codes = [port.post("/v1/chat/best", json=best).status_code for _ in range(3)]
    assert codes == [200, 200, 429]
    refused = chat(port)
    assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 8
    other = port.post("/v1/chat/completions", json={"messages": [CLIENT], "n": 8}, headers=bearer("bob"))
    assert other.status_code == 200 and port.get("/v1/models", headers=bearer("bob")).status_code == 429
    routes.limits = Limits(per_minute=2)  # more answers than a minute has: all of it, and not never
    port = TestClient(http_app(routes, keys, routes.limits), headers=bearer("ann"))
    assert chat(port, n=16).status_code == 200


@pytest.mark.parametrize("guard", ["reply", "mark"])
def test_crises_are_counted_by_kind_and_by_what_the_guard_does(port: TestClient, routes: Ingress, guard: str) -> None:
    routes.replies = routes.replies if guard == "reply" else None
    chat(port)
    said = {"role": "user", "content": "I want to kill myself. He beats me every night."}
    for path, more in (("chat/completions", {}), ("chat/completions", {"stream": True}), ("chat/best", {"of": 2})):
        reply = port.post(f"/v1/{path}", json={"messages": [said], **more})
        assert (reply.status_code, reply.headers["X-Psyray-Crisis"]) == (200, "true")
    kinds = [hit.kind for hit in crisis_hits([said])]
    assert len(kinds) == 2
    assert routes.crises.counted == dict.fromkeys(((k, guard, "phrases") for k in kinds), 3)  # type: ignore[attr-defined]


def test_whoever_writes_german_is_answered_in_german(port: TestClient) -> None:
    said = {"role": "user", "content": "Ich möchte sterben."}
    for header in ({}, {"Accept-Language": "en-US,en;q=0.9"}):
        reply = port.post("/v1/chat/completions", json={"messages": [said]}, headers=header)
        assert "TelefonSeelsorge" in reply.json()["choices"][0]["message"]["content"]


def test_who_is_in_a_crisis_is_answered_whatever_was_asked_for(port: TestClient) -> None:
    said = {"role": "user", "content": "I want to kill myself."}
    reply = chat(port, messages=[said], n=16, max_tokens=9_999)
    assert (reply.status_code, reply.headers["X-Psyray-Crisis"]) == (200, "true")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]


def test_every_answered_request_is_one_line_where_text_is_kept(
    port: TestClient, engine: MadeEngine, routes: Ingress, tmp_path: Path
) -> None:
    routes.transcript = Transcript(tmp_path, "replica")
    chat(port)
    chat(port, model="other"), chat(port, temperature=-1), port.get("/v1/models")  # no answers
    port.post("/v1/chat/best", json={"messages": [CLIENT], "of": 2}, headers=bearer("bob"))
    port.post("/v1/chat/best", json={"messages": [{"role": "user", "content": "I want to die."}], "of": 2})
    port.post("/reward/score", json={"items": [{"messages": [CLIENT], "response": "I see."}]})
    plain, best, crisis, scored = lines(tmp_path)
    assert plain.pop("time") > 0
    assert plain == {
        "key": "ann", "route": "/v1/chat/completions", "id": "", "model": "psyray-round-2", "messages": [CLIENT],
        "answers": ["I see."], "flagged": False, "flagged_by": "", "whole": True,
    }  # fmt: skip
    assert (best["key"], best["answers"], len(best["best_of"]["considered"])) == ("bob", ["I see."], 2)
    assert (crisis["flagged"], crisis["flagged_by"]) == (True, "phrases")
    assert "program" in crisis["answers"][0] and crisis["id"].startswith("chatcmpl-")
    assert (scored["route"], scored["model"], scored["scores"][0]["score"]) == ("/reward/score", "scorer", 6.0)
    assert scored["items"] == [{"messages": [CLIENT], "response": "I see."}] and scored["id"]


def test_a_stream_is_kept_at_its_end_also_where_it_breaks_off(
    port: TestClient, engine: MadeEngine, routes: Ingress, tmp_path: Path
) -> None:
    routes.transcript, routes.timeout_s = Transcript(tmp_path, "replica"), 0.2

    def event(index: int, **delta: str) -> str:
        choice = {"index": index, "delta": delta}
        return f"data: {json.dumps({'id': 'x', 'model': 'm', 'choices': [choice]})}\n\n"

    pieces = [event(0, role="assistant") + event(1, content="One"), event(0, content="Two "), event(0, content="words")]
    for end in ("data: [DONE]\n\n", 30.0):
        engine.says = [*pieces, end]
        chat(port, stream=True, n=2)
    chat(port, stream=True, messages=[{"role": "user", "content": "I want to die."}])
    whole, broken, crisis = lines(tmp_path)
    assert whole["answers"] == broken["answers"] == ["Two words", "One"] and (whole["id"], whole["model"]) == ("x", "m")
    assert whole["whole"] and not broken["whole"] and not whole["flagged"]
    assert crisis["flagged"] and crisis["whole"] and "program" in crisis["answers"][0]


def test_what_cannot_be_kept_is_answered_all_the_same(
    port: TestClient, routes: Ingress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    routes.transcript = Transcript(tmp_path, "replica")
    full = Path("/dev/full").open("w")  # noqa: SIM115  # the transcript closes it
    routes.transcript._handler.stream = full
    assert chat(port).status_code == 200 and full.closed
    assert "No space left" in caplog.text and "quiet" not in caplog.text and "I see" not in caplog.text
    assert chat(port).status_code == 200
    assert [row["answers"] for row in map(json.loads, routes.transcript.file.read_text().split("\n")[1:-1])] == [
        ["I see."]
    ]


@pytest.fixture
def ear(routes: Ingress, port: TestClient) -> Iterator[MadeEar]:
    """The endpoint that these routes ask, with the port on one event loop."""
    with made_ear() as server, port:
        routes.ear = Ear(Ask(server.url, "listener", timeout_s=2.0))
        yield server
        assert port.portal
        port.portal.call(routes.ear.close)


HINT = {"role": "user", "content": "I am allowed to leave now."}


@pytest.mark.parametrize("guard", ["reply", "mark"])
@pytest.mark.parametrize("more", [{}, {"stream": True}, {"of": 2}])
def test_a_models_yes_is_a_flag(
    port: TestClient,
    engine: MadeEngine,
    routes: Ingress,
    ear: MadeEar,
    tmp_path: Path,
    guard: str,
    more: dict[str, Any],
) -> None:
    routes.transcript, routes.replies = Transcript(tmp_path, "replica"), routes.replies if guard == "reply" else None
    engine.says = ['data: {"choices": []}\n\n', "data: [DONE]\n\n"] if "stream" in more else None
    ear.says = "Yes."
    said = [{"role": "system", "content": "Say no."}, CLIENT, {"role": "assistant", "content": "Oh no."}, HINT]
    path = "/v1/chat/best" if "of" in more else "/v1/chat/completions"
    reply = port.post(path, json={"messages": said, **more})
    assert (reply.status_code, reply.headers["X-Psyray-Crisis"], reply.headers["X-Psyray-Crisis-By"]) == (
        200, "true", "model",
    )  # fmt: skip
    assert ("program" in reply.text) == (guard == "reply") and bool(engine.asked) == (guard == "mark")
    assert ear.texts == [CLIENT["content"], HINT["content"]] and ear.asked[-1]["model"] == "listener"
    assert routes.crises.counted == {("not told", guard, "model"): 1}  # type: ignore[attr-defined]
    assert [(row["flagged"], row["flagged_by"]) for row in lines(tmp_path)] == [(True, "model")]


def test_a_models_no_is_none_and_it_is_not_asked_about_what_phrases_flag(
    port: TestClient, routes: Ingress, ear: MadeEar
) -> None:
    assert "X-Psyray-Crisis" not in chat(port).headers and "X-Psyray-Crisis-By" not in chat(port).headers
    flagged = chat(port, messages=[{"role": "user", "content": "I want to die."}])
    assert flagged.headers["X-Psyray-Crisis-By"] == "phrases" and len(ear.asked) == 2
    assert routes.heard.counted == {("no",): 2}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("says", "answer"), [("Let me think.", "unclear"), (401, "http 401")])
@pytest.mark.parametrize("failed", ["pass", "flag"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_model_gives_no_answer_about_passes_or_is_flagged_as_was_asked_for(
    port: TestClient, engine: MadeEngine, routes: Ingress, ear: MadeEar,
    says: Any, answer: str, failed: Literal["pass", "flag"], stream: bool,
) -> None:  # fmt: skip
    assert routes.ear
    routes.ear.ask, ear.says = replace(routes.ear.ask, failed=failed), says
    reply = chat(port, messages=[HINT], stream=stream)
    assert reply.status_code == 200 and reply.headers.get("X-Psyray-Crisis-By") == {"flag": "unanswered"}.get(failed)
    assert ("program" in reply.text) == (failed == "flag") == (not engine.asked)
    assert routes.heard.counted == {(answer,): 1}  # type: ignore[attr-defined]
    assert sum(routes.crises.counted.values()) == (failed == "flag")  # type: ignore[attr-defined]


def test_health_tells_of_an_ear_that_does_not_answer_and_stays_well(
    port: TestClient, routes: Ingress, ear: MadeEar
) -> None:
    async def check() -> None: ...

    handle = SimpleNamespace(check_health=SimpleNamespace(remote=check))
    routes._handles["app.policy.x", False] = handle  # type: ignore[assignment]
    for says, told in ((503, "unavailable"), ("no", "ok")):
        ear.says = says
        chat(port)
        reply = port.get("/healthz")
        assert (reply.status_code, reply.json()) == (200, {"status": "ok", "ear": told})


def test_names_in_refusals_are_short_and_ascii(port: TestClient) -> None:
    reply = chat(port, **{"é" * 5000: 1})
    assert reply.status_code == 422 and len(reply.text) < 400


def test_the_description_names_every_route_and_every_field() -> None:
    known = description()
    assert {"/v1/chat/completions", "/v1/chat/best", "/reward/score", "/v1/models", "/healthz"} < set(known["paths"])
    assert "caution" in known["components"]["schemas"]["BestRequest"]["properties"]
