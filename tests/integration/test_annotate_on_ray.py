"""The experts' application under Ray Serve, as `serve run serve.annotate:build run=RUN` deploys it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from ray import serve

from psyray.active.ledger import Ledger, Question, ledger_url
from psyray.active.queue import ExpertQueue
from psyray.config import Config
from serve.annotate import build
from serve.request import free_port

TOKEN = "anna-has-a-long-token"


def asked(url: str, body: dict | None = None) -> dict:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def test_a_served_question_is_answered_and_a_new_server_goes_on(tmp_path: Path, ray_cluster, monkeypatch) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(Config().model_dump(mode="json")))
    ledger, said = Ledger(ledger_url(None, run)), [{"role": "user", "content": "I cannot sleep."}]
    questions = [
        Question(f"q{i}", "comparison", "experts", "r", {"messages": said, "a": "x", "b": f"y{i}"}) for i in range(2)
    ]
    ExpertQueue(ledger.database).open(ledger.reserve(str(run), "round-1", questions, 2).to_ask, 1)
    monkeypatch.setenv("PSYRAY_KEYS", f"anna annotate {TOKEN}")
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    try:
        for number in range(2):
            serve.run(build({"run": str(run)}), name="experts", route_prefix="/")
            lease = asked(f"{base}/experts/next")
            assert lease["question_id"] == f"q{number}"
            counts = asked(f"{base}/experts/answer", {"question_id": lease["question_id"], "choice": "left"})
            assert counts["answered"] == number + 1
            serve.delete("experts")
        serve.run(build({"run": str(run)}), name="experts", route_prefix="/")
        with urllib.request.urlopen(f"{base}/annotate.js", timeout=60) as reply:
            assert reply.headers["Content-Security-Policy"] and b"experts" in reply.read()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{base}/experts/next", timeout=60)
    finally:
        serve.shutdown()
    ExpertQueue(ledger.database).settle(["q0", "q1"], undo_s=0)
    assert len(ledger.answers(["q0", "q1"])) == 2
    ledger.close()
