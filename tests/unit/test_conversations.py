"""Choices between two policies in conversation: their page's API, and what is kept of them. No Ray, no network."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer
from starlette.testclient import TestClient

from psyray.active.conversations import KIND, Chosen, keep, kept, show, tally, write_pairs
from psyray.active.database import LedgerError
from psyray.active.ledger import Ledger
from psyray.active.place import place_of
from psyray.active.queue import ExpertQueue
from psyray.active.votes import Choice, Vote
from psyray.config import Config, load_config
from psyray.data.ready import pairs_of
from psyray.data.scrub import scrubber
from psyray.errors import PsyrayError
from psyray.files import write_atomic
from psyray.rubric import load_rubric
from serve.access import parse_keys
from serve.compare import Args, Room, http_app, open_room
from serve.endpoint import Endpoint, NoAnswer, Piece

RUBRIC = load_rubric("counselling")
TOKENS = {"carla": "carla-has-a-long-token", "dan": "dan-has-another-token"}
SECRET = "I drink since my father died."


class MadeEndpoint:
    """Stands in for a server of policies: `said` holds what each model answers, None where it fails."""

    def __init__(self, **said: str | None) -> None:
        self.said, self.scored, self.languages = said, 0, list[str]()

    async def names(self) -> list[str]:
        return list(self.said)

    async def answer(self, model: str, messages: Any, language: str) -> AsyncIterator[Piece]:
        self.languages.append(language)
        text = self.said[model]
        if text is None:
            raise NoAnswer("it answered 500")
        for word in text.split(" "):
            yield Piece(word + " ", crisis="drink" in messages[-1]["content"])

    async def scores(self, messages: Any, responses: list[str]) -> list[dict[str, Any]]:
        self.scored += 1
        return [{"score": float(len(text)), "spread": 0.1, "principles": None} for text in responses]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/labels.db"


def client_of(url: str | None, endpoint: MadeEndpoint, **settings: Any) -> TestClient:
    keys = parse_keys([f"{name} compare {token}" for name, token in TOKENS.items()], "here")
    room = Room(endpoint, None, RUBRIC, keys, url, "run", **settings)  # type: ignore[arg-type]
    return TestClient(http_app(room), raise_server_exceptions=False)


def by(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[name]}"}


def say(client: TestClient, words: str = SECRET, name: str = "carla") -> tuple[str, dict[str, str], dict[str, Any]]:
    """The turn's id, the texts by side, and the last event."""
    body = {"messages": [{"role": "user", "content": words}]}
    reply = client.post("/turns/say", json=body, headers=by(name))
    events = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n") if line]
    texts = {"left": "", "right": ""}
    for event in events:
        if "text" in event:
            texts[event["side"]] += event["text"]
    return events[0]["turn_id"], texts, events[-1]


def choose(client: TestClient, turn_id: str, choice: str, name: str = "carla", **more: Any) -> Any:
    return client.post("/turns/choose", json={"turn_id": turn_id, "choice": choice, **more}, headers=by(name))


def test_sides_are_drawn_anew_and_what_is_kept_is_by_policy(url, tmp_path):
    client, sides = client_of(url, MadeEndpoint(zeta="kind words", alpha="cold words")), set()
    for number in range(12):
        turn_id, texts, last = say(client, f"{SECRET} {number}")
        assert last == {"whole": True, "same": False, "crisis": True}
        kind = "left" if texts["left"].startswith("kind") else "right"
        sides.add(kind)
        said = choose(client, turn_id, kind).json()
        assert said == {"kept": True, "goes_on": kind, "policies": None}  # the names stay unsaid
        assert choose(client, turn_id, kind).json()["kept"]  # sent again: the same
        assert choose(client, turn_id, "tie").status_code == 409
    assert sides == {"left", "right"}
    ledger = Ledger(url)
    rows = list(kept(ledger, {"run"}))
    assert len(rows) == 12 and {row["verdict"] for row in rows} == {"B"} and {row["margin"] for row in rows} == {-1.0}
    [count] = tally(ledger, {"run"})
    assert (count["policies"], count["first"], count["second"]) == (["alpha", "zeta"], 0, 12)
    [spent] = ledger.summary("run")
    assert (spent["purpose"], spent["bought"], spent["cost"]) == ("conversations", 12, 0.0)
    # Never an expert's label: no queue shows it, no other run has it.
    assert ExpertQueue(ledger.database).progress()["questions"] == 0
    assert KIND not in ("rating", "comparison") and list(kept(ledger, {"other"})) == []
    assert write_pairs(ledger, {"run"}, tmp_path / "pairs.jsonl") == 12
    words = [f"speeches.sources=[{{name: mine, path: {tmp_path}/pairs.jsonl, use: pairs}}]"]
    [source] = load_config(None, words).speeches.listed()
    pairs = list(pairs_of(source, RUBRIC, scrubber("off"), Counter()))
    assert len(pairs) == 12 and {pair["chosen"].strip() for pair in pairs} == {"kind words"}
    assert {pair["chosen_model"] for pair in pairs} == {"zeta"}
    ledger.close()


def test_the_persons_language_reaches_the_policies_server():
    """A guard's fixed reply names help in the person's country."""
    endpoint, body = MadeEndpoint(a="one", b="two"), {"messages": [{"role": "user", "content": SECRET}]}
    client_of(None, endpoint).post("/turns/say", json=body, headers=by("carla") | {"Accept-Language": "en-GB, de"})
    assert endpoint.languages == ["en-GB, de"] * 2

    async def asked(request: web.Request) -> web.Response:
        heard.append(request.headers.get("Accept-Language"))
        return web.Response(text="data: [DONE]\n\n")

    async def ask() -> None:
        served = web.Application()
        served.router.add_post("/v1/chat/completions", asked)
        async with TestServer(served) as server:
            real = Endpoint(str(server.make_url("")).rstrip("/"), "token")
            for language in ("en-GB, de", ""):
                assert [piece async for piece in real.answer("a", body["messages"], language)] == []

    heard: list[str | None] = []
    asyncio.run(ask())
    assert heard == ["en-GB, de", None]


def test_the_reward_models_view_is_marked_where_it_came_first(url):
    endpoint = MadeEndpoint(a="one", b="three words more")
    client = client_of(url, endpoint, reveal=True)
    turn_id, texts, _ = say(client)
    seen = client.post("/turns/view", json={"turn_id": turn_id}, headers=by("carla")).json()
    assert {side: seen[side]["score"] for side in seen} == {side: len(texts[side]) for side in texts}
    names = choose(client, turn_id, "harmful", note="both").json()["policies"]
    assert sorted(names.values()) == ["a", "b"] and texts[min(names, key=names.get)].startswith("one")
    turn_id, _, _ = say(client)
    choose(client, turn_id, "tie")
    client.post("/turns/view", json={"turn_id": turn_id}, headers=by("carla"))  # after the choice
    ledger = Ledger(url)
    first, second = kept(ledger, {"run"})
    assert (first["verdict"], first["scores_seen"], first["note"]) == ("invalid", True, "both")
    assert [s["score"] for s in first["scores"]] == [len("one "), len("three words more ")]
    assert (second["verdict"], second["scores_seen"], second["scores"]) == ("tie", False, None)
    assert write_pairs(ledger, {"run"}, Path(url.removeprefix("sqlite:///")).with_name("p.jsonl")) == 0
    ledger.close()


@pytest.mark.parametrize("endpoint", [MadeEndpoint(a="x", b=None), MadeEndpoint(a="x", b=" ")])
def test_a_turn_without_both_answers_cannot_be_chosen(url, endpoint):
    client = client_of(url, endpoint)
    turn_id, _, last = say(client)
    assert last["whole"] is False
    for path in ("choose", "view"):
        body = {"turn_id": turn_id} | ({"choice": "left"} if path == "choose" else {})
        assert client.post(f"/turns/{path}", json=body, headers=by("carla")).status_code == 409
    assert endpoint.scored == 0


def test_a_choice_that_the_ledger_did_not_take_is_no_choice(url, monkeypatch):
    client = client_of(url, MadeEndpoint(a="one", b="two"))
    turn_id, _, _ = say(client)

    def fails(*_: object) -> None:
        raise LedgerError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "answer", fails)
        assert choose(client, turn_id, "left").status_code == 503
    assert choose(client, turn_id, "right").json()["kept"] is True
    assert choose(client, turn_id, "left").status_code == 409
    ledger = Ledger(url)
    [row] = kept(ledger, {"run"})
    assert Vote(row["vote"]).choice(row["a_left"]) is Choice.RIGHT
    ledger.close()


def test_one_that_the_ledger_took_though_nobody_heard_of_it_stays(url, monkeypatch):
    client = client_of(url, MadeEndpoint(a="one", b="two"))
    turn_id, _, _ = say(client)

    def fails(*_: object) -> None:
        raise LedgerError("the connection was lost after the commit")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "answers", fails)
        assert choose(client, turn_id, "left").status_code == 503
    assert choose(client, turn_id, "right").status_code == 409
    assert choose(client, turn_id, "left").json()["kept"] is True


def test_of_two_choices_at_once_one_is_kept_and_the_other_is_told(url, monkeypatch):
    client, write = client_of(url, MadeEndpoint(a="one", b="two")), Ledger.answer
    turn_id, _, _ = say(client)

    def slow(ledger: Ledger, answers: Any) -> None:
        time.sleep(0.2)
        write(ledger, answers)

    monkeypatch.setattr(Ledger, "answer", slow)
    with ThreadPoolExecutor(2) as pool:
        asked = {choice: pool.submit(choose, client, turn_id, choice) for choice in ("left", "right")}
    replies = {choice: reply.result() for choice, reply in asked.items()}
    assert sorted(reply.status_code for reply in replies.values()) == [200, 409]
    ledger = Ledger(url)
    [row] = kept(ledger, {"run"})
    assert replies[Vote(row["vote"]).choice(row["a_left"])].status_code == 200
    ledger.close()


def test_equal_answers_and_a_server_that_keeps_nothing_leave_no_row(url):
    client = client_of(url, MadeEndpoint(a="the same", b="the same "))
    turn_id, _, last = say(client)
    assert last["same"] and choose(client, turn_id, "tie").json() == {
        "kept": False,
        "goes_on": "left",
        "policies": None,
    }
    ledger = Ledger(url)
    assert list(kept(ledger, {"run"})) == [] and ledger.summary("run") == []
    ledger.close()
    client = client_of(None, MadeEndpoint(a="x", b="y"))
    turn_id, _, _ = say(client)
    assert choose(client, turn_id, "right").json()["kept"] is False
    assert client.get("/turns/about", headers=by("carla")).json()["kept"] is False


def test_a_turn_is_its_persons_and_gone_once_they_went_on(url):
    client = client_of(url, MadeEndpoint(a="x", b="y"))
    first, _, _ = say(client)
    assert choose(client, first, "left", name="dan").status_code == 404
    second, _, _ = say(client)
    assert choose(client, first, "left").status_code == 404 and choose(client, second, "left").status_code == 200


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least 1"),
        ([{"role": "assistant", "content": SECRET}], "by turns"),
        ([{"role": "user", "content": SECRET}, {"role": "assistant", "content": "x"}], "the user's"),
        ([{"role": "system", "content": SECRET}], "role"),
        ([{"role": "user", "content": ""}], "at least 1"),
        ([{"role": "user", "content": SECRET * 1000}], "at most 16000"),
        ([{"role": "user", "content": SECRET}] * 64, "at most 63"),
    ],
)
def test_what_is_no_conversation_is_refused_and_not_repeated(url, messages, said):
    reply = client_of(url, MadeEndpoint(a="x", b="y")).post(
        "/turns/say", json={"messages": messages}, headers=by("carla")
    )
    assert reply.status_code == 422 and said in reply.text and SECRET not in reply.text


def test_one_policy_cannot_be_compared_and_whoever_has_no_key_learns_nothing(url):
    client = client_of(url, MadeEndpoint(a="x"))
    body = {"messages": [{"role": "user", "content": SECRET}]}
    reply = client.post("/turns/say", json=body, headers=by("carla"))
    assert reply.status_code == 503 and "lists 1 model" in reply.text and "retry-after" in reply.headers
    for path in ("say", "choose", "view"):
        assert client.post(f"/turns/{path}", json=body).status_code == 401
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("compare.js", "page.js", "page.css", "icon.svg"):
        part = client.get(f"/{name}")
        assert part.status_code == 200 and "://" not in part.text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert client.get("/annotate.js").status_code == 401 and client.get("/healthz").json() == {"status": "ok"}


def test_under_a_prefix_the_same_keys_and_pages_hold(url):
    keys = parse_keys([f"carla compare {TOKENS['carla']}"], "here")
    room = Room(MadeEndpoint(a="x", b="y"), None, RUBRIC, keys, url, "run")  # type: ignore[arg-type]
    client = TestClient(http_app(room), root_path="/compare", base_url="http://here")
    assert client.get("/compare/").status_code == 200 and client.get("/compare/page.js").status_code == 200
    moved = client.get("/compare", follow_redirects=False)
    assert moved.status_code == 307 and moved.headers["location"].endswith("/compare/")
    assert client.get("/compare/turns/about").status_code == 401
    assert client.get("/compare/turns/about", headers=by("carla")).json()["person"] == "carla"


def test_the_server_reads_the_runs_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("PSYRAY_KEYS", f"carla compare {TOKENS['carla']}")
    monkeypatch.setenv("PSYRAY_POLICY_KEY", "a-secret-token")
    run = tmp_path / "runs" / "one"
    with pytest.raises(PsyrayError, match="no run at"):
        open_room(Args.read({"run": str(run)}))
    run.mkdir(parents=True)
    write_atomic(run / "config.yaml", yaml.safe_dump(Config().model_dump(mode="json")))
    room = open_room(Args.read({"run": str(run), "url": "http://127.0.0.1:9000/", "models": "a, b"}))
    (tmp_path / "runs" / "two").mkdir()
    write_atomic(tmp_path / "runs" / "two" / "config.yaml", "loop: {round: 3}\n")
    with pytest.raises(PsyrayError, match=r"two/config\.yaml: unknown key 'loop\.round'.*did you mean 'rounds'"):
        place_of(tmp_path / "runs" / "two")
    assert (room.endpoint.url, room.models, room.endpoint.token) == (
        "http://127.0.0.1:9000",
        ("a", "b"),
        "a-secret-token",
    )
    with pytest.raises(PsyrayError, match="nobody has chosen"):
        show(place_of(run), None, print)
    ledger, said, texts = Ledger(room.ledger or ""), [], ("x", "y")
    words = [{"role": "user", "content": SECRET}]
    chosen = Chosen("t", "carla", "r", words, ("a", "b"), texts, Choice.LEFT, True, 1.0, scores_seen=False)
    keep(ledger, room.run, chosen)
    show(place_of(run), tmp_path / "p.jsonl", said.append)
    assert said == [
        "a 1, b 0, ties 0, harmful 0; by 1 person, 0 after a look at the reward model's scores",
        f"{tmp_path}/p.jsonl: 1 pairs",
    ]
    ledger.close()
    assert "a-secret-token" not in repr(room) and room.ledger == f"sqlite:///{tmp_path}/runs/labels.db"
    assert open_room(Args.read({"run": str(run), "keep": "false"})).ledger is None
    for words, said in (
        ({"models": "a"}, "two different names"),
        ({"models": "a,a"}, "two different names"),
        ({"url": "ftp://x"}, "url"),
        ({"modles": "a,b"}, "did you mean 'models'"),
    ):
        with pytest.raises(PsyrayError, match=said):
            open_room(Args.read({"run": str(run), **words}))
    monkeypatch.setenv("PSYRAY_KEYS", "anna annotate anna-has-a-long-token")
    with pytest.raises(PsyrayError, match="no key has the role compare"):
        open_room(Args.read({"run": str(run)}))


def test_choices_of_a_mirrored_run_are_found_in_whatever_folder_it_is_fetched_into(tmp_path, monkeypatch):
    monkeypatch.setenv("PSYRAY_KEYS", f"carla compare {TOKENS['carla']}")
    url, said = f"sqlite:///{tmp_path}/all.db", list[str]()
    settings = Config.model_validate({"run": {"mirror": "s3://bucket/demo"}, "ledger": {"url": url}})
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
        write_atomic(tmp_path / name / "config.yaml", yaml.safe_dump(settings.model_dump(mode="json")))
    room = open_room(Args.read({"run": str(tmp_path / "here")}))
    words = [{"role": "user", "content": SECRET}]
    chosen = Chosen("t", "carla", "r", words, ("a", "b"), ("x", "y"), Choice.LEFT, True, 1.0, scores_seen=False)
    keep(Ledger(room.ledger or ""), room.run, chosen)
    show(place_of(tmp_path / "elsewhere"), None, said.append)
    assert said[0].startswith("a 1, b 0")
