"""The experts' HTTP API: keys, questions, answers, refusals. No Ray is started."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from psyray.active.ledger import Ledger, Question
from psyray.active.queue import ExpertQueue
from psyray.config import Config
from psyray.errors import PsyrayError
from psyray.files import write_atomic
from psyray.rubric import load_rubric
from serve.access import Key, read_keys
from serve.annotate import MAX_BODY, MAX_NOTE, Args, Desk, http_app, open_desk

RUBRIC = load_rubric("counselling")
TOKENS = {"anna": "anna-has-a-long-token", "ben": "ben-has-another-token"}
SECRET = "I drink since my father died."


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Key, ...]:
    file = tmp_path / "keys"
    file.write_text("# experts\n" + "\n".join(f"{name} annotate {token}" for name, token in TOKENS.items()) + "\n")
    return read_keys(file)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/labels.db"


@pytest.fixture
def client(url: str, keys: tuple[Key, ...]) -> TestClient:
    return TestClient(http_app(Desk(url, frozenset({"run"}), RUBRIC, 600, keys)), raise_server_exceptions=False)


def put(url: str, count: int, overlap: int = 1) -> list[str]:
    ledger, said = Ledger(url), [{"role": "user", "content": SECRET}]
    asked = [
        Question(f"q{i}", "comparison", "experts", "r", {"messages": said, "a": "good", "b": f"bad {i}"})
        for i in range(count)
    ]
    ExpertQueue(ledger.database).open(ledger.reserve("run", "round-1", asked, None).to_ask, overlap)
    ledger.close()
    return [q.question_id for q in asked]


def by(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[name]}"}


def test_an_expert_works_through_the_questions(client, url):
    put(url, 2)
    shown = client.get("/experts/next", headers=by("anna")).json()
    assert set(shown) == {"question_id", "messages", "left", "right", "until"}  # blind: no model, score or strategy
    assert shown["messages"][0]["content"] == SECRET and {shown["left"], shown["right"]} == {"good", "bad 0"}
    better = "left" if shown["left"] == "good" else "right"
    given = {"question_id": "q0", "choice": better, "ratings": {better: {"empathy": 5}}, "note": "ja"}
    counts = client.post("/experts/answer", json=given, headers=by("anna")).json()
    assert (counts["answered"], counts["left"], counts["given"]) == (1, 1, 1)
    assert client.post("/experts/answer", json=given, headers=by("anna")).status_code == 200  # sent again: the same
    changed = client.post("/experts/answer", json=given | {"choice": "tie"}, headers=by("anna"))
    assert changed.status_code == 409 and "undo first" in changed.json()["detail"]
    back = client.post("/experts/undo", headers=by("anna")).json()
    other = "right" if better == "left" else "left"
    assert back["question_id"] == "q0" and back["left"] == shown["left"]
    assert back["said"] == {"choice": better, "ratings": {better: {"empathy": 5}, other: {}}, "note": "ja"}
    client.post("/experts/answer", json={"question_id": "q0", "choice": "tie"}, headers=by("anna"))
    assert client.get("/experts/progress", headers=by("anna")).json()["expert"] == "anna"
    ledger = Ledger(url)
    ExpertQueue(ledger.database).settle(["q0"], undo_s=0)
    assert ledger.answers(["q0"])["q0"].answer["verdict"] == "tie"
    late = client.post("/experts/undo", headers=by("anna"))
    assert late.status_code == 410 and "final" in late.json()["detail"]
    ledger.close()


def test_two_experts_get_different_questions_then_none(client, url):
    put(url, 2)
    ids = [client.get("/experts/next", headers=by(name)).json()["question_id"] for name in TOKENS]
    assert sorted(ids) == ["q0", "q1"]
    for name, question in zip(TOKENS, ids, strict=True):
        client.post("/experts/answer", json={"question_id": question, "choice": "skip"}, headers=by(name))
    for name, question in zip(reversed(TOKENS), ids, strict=True):
        assert client.get("/experts/next", headers=by(name)).json()["question_id"] == question
        client.post("/experts/answer", json={"question_id": question, "choice": "left"}, headers=by(name))
    assert client.get("/experts/next", headers=by("ben")).status_code == 204
    assert client.get("/experts/agreement", headers=by("ben")).json()["all"]["compared"] == 0


def test_who_takes_a_break_gives_the_question_back(client, url):
    put(url, 1)
    assert client.get("/experts/next", headers=by("anna")).status_code == 200
    assert client.get("/experts/next", headers=by("ben")).status_code == 204
    assert client.post("/experts/release", headers=by("anna")).json() == {"released": 1}
    assert client.get("/experts/next", headers=by("ben")).json()["question_id"] == "q0"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong-token-of-good-length", "Basic x", "Bearer \xff"])
def test_whoever_has_no_key_learns_nothing(client, url, header):
    put(url, 1)
    headers = {"Authorization": header.encode("latin-1")} if header is not None else {}
    for method, path in [("get", "next"), ("get", "progress"), ("get", "agreement"), ("get", "rubric"),
                         ("post", "undo"), ("post", "answer"), ("post", "release")]:  # fmt: skip
        reply = client.request(method, f"/experts/{path}", headers=headers)
        assert (reply.status_code, reply.json()["error"]["message"]) == (401, "unauthorized"), path
    token = TOKENS["anna"]
    assert client.get("/experts/next", headers={"Authorization": f"Basic {token}"}).status_code == 401


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ({"question_id": "q9", "choice": "tie"}, 404, "not given to you"),
        ({"question_id": "q0", "choice": "both"}, 422, "choice"),
        ({"question_id": "q0", "choice": "tie", "extra": 1}, 422, "extra"),
        ({"question_id": "q0", "choice": "tie", "note": "x" * (MAX_NOTE + 1)}, 422, "note"),
        ({"question_id": "q0", "choice": "tie", "ratings": {"left": {"humour": 3}}}, 422, "empathy"),
        ({"question_id": "q0", "choice": "tie", "ratings": {"left": {"empathy": 6}}}, 422, "1 to 5"),
        ({"question_id": "q0", "choice": "tie", "ratings": {"middle": {"empathy": 3}}}, 422, "left or right"),
        ({"question_id": "q0", "choice": "tie", "note": "x" * MAX_BODY}, 413, "too large"),
        ({"question_id": "q" * 200, "choice": "tie"}, 422, "question_id"),
        ({"question_id": "q0\x00", "choice": "tie"}, 422, "question_id"),
    ],
)
def test_what_cannot_be_an_answer_is_refused_and_not_repeated(client, url, body, code, said):
    put(url, 1)
    client.get("/experts/next", headers=by("anna"))
    reply = client.post("/experts/answer", json=body, headers=by("anna"))
    assert reply.status_code == code and said in reply.text and "xxxx" not in reply.text
    assert client.get("/experts/progress", headers=by("anna")).json()["answered"] == 0


@pytest.mark.parametrize(
    "body", [b'{"\\ud800": 1}', b'{"%s": 1}' % (b"n" * 5000), b"{%s}" % b",".join(b'"k%d": 1' % i for i in range(500))]
)
def test_names_that_are_no_names_are_refused_in_a_few_words(client, body):
    reply = client.post("/experts/answer", content=body, headers={**by("anna"), "Content-Type": "application/json"})
    assert reply.status_code == 422 and len(reply.content) < 3000


def test_a_body_without_a_length_is_counted(client, url):
    put(url, 1)
    chunks = (b"x" * 1024 for _ in range(MAX_BODY // 1024 + 2))
    headers = by("anna") | {"Content-Type": "application/json"}
    reply = client.post("/experts/answer", content=chunks, headers=headers)
    assert reply.status_code == 413


def test_odd_notes_are_kept(client, url):
    put(url, 1)
    client.get("/experts/next", headers=by("anna"))
    body = json.dumps({"question_id": "q0", "choice": "left", "note": "a\x00b 😀 é"})
    headers = by("anna") | {"Content-Type": "application/json"}
    assert client.post("/experts/answer", content=body, headers=headers).status_code == 200


def test_under_a_prefix_the_page_is_the_same(url, keys):
    app = http_app(Desk(url, frozenset({"run"}), RUBRIC, 600, keys))
    client = TestClient(app, root_path="/annotate", base_url="http://here")
    assert client.get("/annotate/").status_code == 200 and client.get("/annotate/annotate.js").status_code == 200
    assert client.get("/annotate/experts/progress").status_code == 401
    assert client.get("/annotate/experts/progress", headers=by("anna")).status_code == 200


def test_the_page_and_its_parts_come_from_here_and_hold_nothing_of_clients(client, url):
    put(url, 1)
    html = client.get("/")
    assert html.status_code == 200 and SECRET not in html.text and "http" not in html.text
    policy = html.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy and "//" not in policy
    for name, kind in (
        ("annotate.js", "javascript"),
        ("page.js", "javascript"),
        ("page.css", "css"),
        ("icon.svg", "svg"),
    ):
        part = client.get(f"/{name}")
        assert part.status_code == 200 and kind in part.headers["content-type"]
        assert "://" not in part.text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    for part in re.findall(r'(?:src|href)="([^"]+)"', html.text):
        assert client.get(f"/{part}").status_code == 200, part
    for path in ("/annotate.py", "/compare.js", "/docs"):
        assert client.get(path).status_code == 401 and client.get(path, headers=by("anna")).status_code == 403
    assert client.get("/healthz").json() == {"status": "ok"}


def test_a_ledger_that_is_gone_is_told_as_such(client, url, monkeypatch):
    from psyray.active.database import LedgerError

    def gone(*_: object) -> None:
        raise LedgerError(f"the label ledger at {url} failed: disk full")

    monkeypatch.setattr(ExpertQueue, "lease", gone)
    reply = client.get("/experts/next", headers=by("anna"))
    assert reply.status_code == 503 and reply.headers["retry-after"] == "5" and "sqlite" not in reply.text


def test_the_server_reads_the_runs_configuration(tmp_path, monkeypatch):
    import yaml

    monkeypatch.setenv("PSYRAY_KEYS", "anna annotate anna-has-a-long-token")
    run = tmp_path / "runs" / "one"
    with pytest.raises(PsyrayError, match=r"no run at .*oracle\.kind=experts"):
        open_desk(Args.read({"run": str(run)}))
    run.mkdir(parents=True)
    settings = Config.model_validate({"oracle": {"kind": "experts", "lease_s": 5}}).model_dump(mode="json")
    write_atomic(run / "config.yaml", yaml.safe_dump(settings))
    desk = open_desk(Args.read({"run": str(run)}))
    assert desk.contact == "" and open_desk(Args.read({"run": str(run), "contact": "Dr. Ito"})).contact == "Dr. Ito"
    assert (desk.ledger, desk.lease_s) == (f"sqlite:///{tmp_path}/runs/labels.db", 5) and str(run) in desk.runs
    monkeypatch.setenv("PSYRAY_KEYS", "anna chat,score anna-has-a-long-token")
    with pytest.raises(PsyrayError, match="no key has the role annotate: give keys=FILE, or set PSYRAY_KEYS"):
        open_desk(Args.read({"run": str(run)}))
    with pytest.raises(PsyrayError, match=r"unknown argument 'kyes'; did you mean 'keys'"):
        Args.read({"run": str(run), "kyes": "x"})
    with pytest.raises(PsyrayError, match=r"serve run serve\.annotate:build run=RUN"):
        Args.read({})


SERVER = """
import sys
import uvicorn
from pathlib import Path
from psyray.rubric import load_rubric
from serve.annotate import Desk, http_app
from serve.access import read_keys
url, keys, port = sys.argv[1:]
desk = Desk(url, frozenset({"run"}), load_rubric("counselling"), 600, read_keys(Path(keys)))
uvicorn.run(http_app(desk), host="127.0.0.1", port=int(port), log_level="error")
"""


@contextmanager
def killed_server(url: str, folder: Path) -> Iterator[httpx.Client]:
    """A server of its own process, killed with -9 at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", SERVER, url, str(folder / "keys"), str(port)])
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=by("anna"), timeout=30) as client:
        until = time.monotonic() + 60
        while True:
            try:
                client.get("/healthz").raise_for_status()
                break
            except httpx.TransportError:  # it is still starting
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.1)
        yield client
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_that_is_killed_loses_no_answer_and_shows_the_same_question_again(tmp_path, url, keys):
    ids = put(url, 3)
    with killed_server(url, tmp_path) as client:
        first = client.get("/experts/next").json()
        client.post("/experts/answer", json={"question_id": first["question_id"], "choice": "left"}).raise_for_status()
        held = client.get("/experts/next").json()
    with killed_server(url, tmp_path) as client:
        again = client.get("/experts/next").json()
        assert {**again, "until": 0} == {**held, "until": 0}
        counts = client.post("/experts/answer", json={"question_id": held["question_id"], "choice": "tie"}).json()
        assert (counts["answered"], counts["left"]) == (2, 1)
        assert client.post("/experts/undo").json()["question_id"] == held["question_id"]
    ledger = Ledger(url)
    ExpertQueue(ledger.database).settle(ids, undo_s=0)
    assert list(ledger.answers(ids)) == [first["question_id"]]
    ledger.close()
