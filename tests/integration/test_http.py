"""The HTTP engine against a hostile endpoint: every fault is one row, money is kept, and a kill loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from hostile_server import GOOD, SCRIPT, Say, hostile_server
from pydantic import SecretStr

from psyray.active.ledger import Ledger
from psyray.config import load_config
from psyray.data.generate import REQUESTS, answer_all, draw_row
from psyray.data.judge import Desk, judge
from psyray.engines import chat, http
from psyray.engines.journal import read_totals
from psyray.engines.judges import ASKED, error_class, make_judge
from psyray.engines.thinking import CUT_OFF
from psyray.errors import PsyrayError
from psyray.records import RESPONSES
from psyray.rubric import load_rubric
from psyray.run import Folder
from psyray.sections.data import EndpointSection, EngineSection, JudgeSection
from psyray.stream import CALLS, stream

RUBRIC = load_rubric("counselling")
SPEECH = [{"role": "user", "content": "I cannot sleep since my father died."}]
PRICES = (1.0, 10.0)  # with the server's usage 0.002 a call


@pytest.fixture
def quick(monkeypatch):
    """Rests of this process that nobody asked for take no time."""
    monkeypatch.setattr(chat, "backoff", lambda attempt, asked_s: 0.01 if asked_s is None else asked_s)


def rated(folder: Path, url: str, words: list[str], **settings) -> dict[str, dict]:
    """The outcomes by word, without Ray."""
    section = EndpointSection(**({"url": url, "timeout_s": 1, "concurrency": 4, "retries": 1} | settings))
    worker = http.HttpRater(RUBRIC, section, "m", 200, SecretStr("sesame"), folder)
    rows = [{"key": f"{i}/{w}", "messages": SPEECH, "response": f"word {w} here"} for i, w in enumerate(words)]
    try:
        (table,) = worker(pa.Table.from_pylist(rows))
    finally:
        worker.close()
    return {row["key"].split("/")[1]: row for row in table.to_pylist()}


def responses(*words: str) -> list[dict]:
    return [
        {"response_id": str(i), "speech_id": "s", "messages": SPEECH, "text": f"word {w} here {i}", "status": "ok"}
        for i, w in enumerate(words)
    ]


def desk(tmp_path: Path, **settings) -> Desk:
    section = JudgeSection(engine="http", model="m", price_per_million_tokens=PRICES, **settings)
    made = make_judge(section, RUBRIC, EngineSection(), 10)
    return Desk(made, RUBRIC, Ledger(f"sqlite:///{tmp_path}/labels.db"), "run", section)


def folder(tmp_path: Path) -> Folder:
    (tmp_path / "stage").mkdir(exist_ok=True)
    return Folder(tmp_path / "stage")


def all_cpus_are_free() -> bool:
    import ray

    deadline = time.monotonic() + 20  # an actor takes a moment to end
    while (busy := ray.cluster_resources()["CPU"] - ray.available_resources()["CPU"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not busy


def judged(place: Folder, here: Desk, rows: list[dict]) -> list[dict]:
    """The rows that judging leaves in the folder."""
    return list(judge(place, here, lambda: rows, len(rows), purpose="judgements", bounded=False).each())


FAULTS = {
    "broken": "http 500",
    "zero": "out of scale: clarity is 0, outside 1 to 5",
    "six": "out of scale: empathy is 6, outside 1 to 5",
    "ten": "out of scale: safety is 10, outside 1 to 5",
    "half": "out of scale: empathy is 4.5, not a whole number",
    "quoted": "wrong schema: empathy is a str, not a whole number",
    "chatty": "wrong schema: empathy is a str, not a whole number",
    "endless": "out of scale: empathy is inf, outside 1 to 5",
    "digits": "not json: the JSON object cannot be read",
    "partial": "wrong schema: no rating for relevance",
    "listed": "garbled: the answer's content is no text",
    "nonsense": "not json: no JSON object in the answer",
    "endlessly": CUT_OFF,
    "silently": CUT_OFF,
    "surrogate": "not json: no JSON object in the answer",
    "refused": "refused 401",
    "unfit": "refused 400",
    "moved": "refused 307",
    "hang": "timeout: no answer within 1 s",
    "torn": "connection: ClientPayloadError",
    "garbled": "garbled: the answer is no JSON",
    "foreign": "garbled: the answer is not in the OpenAI chat format",
    "nested": "garbled: the answer is no JSON",
    "huge": "too large: an answer of more than 4194304 bytes",
}
FINE = {
    "fine": 1,
    "prose": 1,
    "thoughtful": 1,
    "busy": 3,
    "dated": 2,
    "cut": 2,
    "free": 1,
    "reset": 2,
}  # and the attempts they take


def test_each_fault_of_an_endpoint_is_one_rows_outcome(tmp_path, quick):
    with hostile_server() as server:
        words = [*FAULTS, *FINE]
        found = rated(tmp_path, server.url, words, retries=2, price_per_million_tokens=PRICES)
    assert set(found) == {*FAULTS, *FINE}
    assert {word: row["error"] for word, row in found.items() if not row["ratings"]} == FAULTS
    once = {"refused": 1, "unfit": 1, "moved": 1}
    assert {w: r["attempts"] for w, r in found.items()} == dict.fromkeys(FAULTS, 3) | once | FINE == dict(server.calls)
    assert found["busy"]["latency_s"] >= 1.0 and found["dated"]["latency_s"] >= 1.0  # Retry-After
    assert found["fine"]["cost"] == pytest.approx(0.002) and found["six"]["cost"] == pytest.approx(0.006)
    assert found["free"]["cost"] == 0
    assert found["thoughtful"]["ratings"] == found["fine"]["ratings"]  # and not those of the thought
    assert server.keys == {"Bearer sesame"} and server.most <= 4
    totals = read_totals(tmp_path)
    assert totals.calls == sum(server.calls.values()) and totals.lost == 0
    assert totals.cost == pytest.approx(sum(row["cost"] for row in found.values()))
    for secret in ("sesame", "father", "drink"):
        assert not any(secret in row["error"] for row in found.values())
    assert "sesame" not in "".join(path.read_text() for path in tmp_path.glob("*.jsonl"))


def test_further_fields_of_a_request_come_over_the_usual_ones(tmp_path):
    body = {"temperature": None, "max_tokens": None, "max_completion_tokens": 900, "reasoning_effort": "low"}
    with hostile_server() as server:
        rated(tmp_path, server.url, ["fine"], body=body)
    sent = server.bodies["fine"]
    assert set(sent) == {"model", "messages", "max_completion_tokens", "reasoning_effort"}
    assert (sent["max_completion_tokens"], sent["reasoning_effort"]) == (900, "low")


def test_what_one_request_is_told_slows_all(tmp_path):
    with hostile_server() as server:
        words = [*["steady"] * 8, "busy", *["steady"] * 60]
        rated(tmp_path, server.url, words, retries=3, timeout_s=10)
        told = next(at for at, word in server.came if word == "busy")
        during = [at - told for at, _ in server.came if 0.2 < at - told < 1.0]
        assert not during and max(at for at, _ in server.came) - told > 1.0


def test_requests_a_minute_are_kept(tmp_path):
    with hostile_server() as server:
        rated(tmp_path, server.url, ["fine"] * 30, requests_per_minute=600, concurrency=16)
        times = [at for at, _ in server.came]
    assert 1.9 <= times[-1] - times[0] <= 10  # 10 at once, then 10 a second


def test_a_row_that_waits_holds_no_other_row(tmp_path, ray_cluster):
    with hostile_server() as server:
        found: list[dict] = []
        made = desk(tmp_path, url=server.url, concurrency=2, timeout_s=90)
        words = ["last", *["fine"] * 255]
        rows = [{"key": r["response_id"], "messages": SPEECH, "response": r["text"]} for r in responses(*words)]
        rate = partial(made.judge.rate, folder=tmp_path / CALLS)
        stream(folder(tmp_path), rows, rate, found.extend, title="judge", schema=ASKED, total=len(rows))
    assert server.calls == {"last": 1, "fine": 255} and server.most == 2
    assert len({row["key"] for row in found}) == 256 and not any(row["error"] for row in found)


def test_money_stops_the_stage_and_more_money_goes_on(tmp_path, ray_cluster):
    rows = responses(*["steady"] * 100)
    with hostile_server() as server:
        poor = desk(tmp_path, url=server.url, concurrency=4, max_cost=0.09)
        for _ in range(2):  # no more is spent by asking again
            with pytest.raises(PsyrayError) as caught:
                judged(folder(tmp_path), poor, rows)
            spent = read_totals(tmp_path / "stage" / CALLS)
            assert spent.calls == sum(server.calls.values()) and spent.lost == 0
            assert 0.08 < spent.cost <= 0.09 and spent.cost == pytest.approx(0.002 * spent.calls)
            told = str(caught.value)
            assert told.startswith("judge: judge.max_cost (0.09) does not reach") and f"{spent.calls} calls" in told
            assert "\n" not in told and "raise judge.max_cost and run the same command again" in told
            assert all_cpus_are_free()  # though the error lives
        rich = desk(tmp_path, url=server.url, concurrency=4, max_cost=1.0)
        found = judged(folder(tmp_path), rich, rows)
        assert server.calls["steady"] == 100 and {row["score"] for row in found} == {4.0}
    assert rich.ledger.summary("run")[0]["cost"] == pytest.approx(0.2)


def test_an_endpoint_that_refuses_all_stops_the_stage_early_and_costs_no_row(tmp_path, ray_cluster, monkeypatch):
    rows = responses(*["refused"] * 300)
    with hostile_server() as server:
        made = desk(tmp_path, url=server.url, concurrency=4)
        with pytest.raises(PsyrayError, match=r"20 rows in a row.*`refused 401`; see whether the key in \$PSYRAY_JUD"):
            judged(folder(tmp_path), made, rows)
        assert 20 <= server.calls["refused"] < 30
        assert made.ledger.summary("run")[0]["failed"] == 0
        monkeypatch.setitem(SCRIPT, "refused", [Say()])
        found = judged(folder(tmp_path), made, rows)
    assert {row["status"] for row in found} == {"ok"} and len(found) == 300


@pytest.mark.parametrize(
    ("word", "settings", "why"),
    [
        ("weary", {}, "answers http 429 and asks for a rest of 86400 s"),
        ("free", {"max_cost": 1.0, "price_per_million_tokens": PRICES}, "20 answers in a row hold no usage"),
    ],
)
def test_what_cannot_go_on_stops(tmp_path, quick, word, settings, why):
    with hostile_server() as server:
        with pytest.raises(PsyrayError, match=why):
            rated(tmp_path, server.url, [word] * 100, **settings)
        assert sum(server.calls.values()) < 30


def test_an_endpoint_that_is_not_there_stops_the_stage(tmp_path, quick):
    with hostile_server() as server:
        url = server.url
    told = (
        rf"the endpoint at {url} failed 20 rows in a row.*`connection: \w+`; see whether .* is up .* So far \d+ calls"
    )
    with pytest.raises(PsyrayError, match=told):
        rated(tmp_path, url, ["fine"] * 100)


CHILD = """
import sys
from pathlib import Path
import pyarrow as pa
from pydantic import SecretStr
from psyray.sections.data import EndpointSection
from psyray.engines.http import HttpRater
from psyray.rubric import load_rubric
endpoint = EndpointSection(url=sys.argv[1], concurrency=4)
rater = HttpRater(load_rubric("counselling"), endpoint, "m", 200, SecretStr(""), Path(sys.argv[2]))
speech = [{"role": "user", "content": "I cannot sleep."}]
rows = [{"key": str(i), "messages": speech, "response": f"word steady here {i}"} for i in range(int(sys.argv[3]))]
(done,) = rater(pa.Table.from_pylist(rows))
assert done["error"].to_pylist() == [""] * len(rows)
"""


def test_kills_cost_at_most_what_was_under_way(tmp_path):
    command = [sys.executable, "-c", CHILD]
    with hostile_server() as server:
        for kill_at in (40, 80, None):
            child = subprocess.Popen(
                [*command, server.url, str(tmp_path), "150"], env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            while child.poll() is None and (kill_at is None or len(server.came) < kill_at):
                time.sleep(0.005)
            if kill_at is not None:
                child.kill()
            assert child.wait() == (0 if kill_at is None else -9)
        asked = len(server.came)
    totals = read_totals(tmp_path)
    assert totals.calls - totals.lost == 150 <= asked <= totals.calls <= 150 + 8
    answered = [
        json.loads(line) for path in sorted(tmp_path.glob("*.jsonl")) for line in path.open() if '"got"' in line
    ]
    assert len({line["got"] for line in answered}) == 150  # nothing that was answered was asked again


def test_responders_live_behind_an_endpoint_too(tmp_path, ray_cluster, monkeypatch):
    monkeypatch.setenv("PSYRAY_API_KEY", "sesame")
    sampling = {"temperature": 0.7, "top_p": 1.0, "max_tokens": 64, "stop": [], "seed": 7}
    rows = [
        {"key": w, "messages": [*SPEECH, {"role": "user", "content": f"Counsellor's response: word {w} here"}],
         "sampling": json.dumps(sampling), "draw": f"{w}'s"}
        for w in ("fine", "nonsense", "unfit", "free")
    ]  # fmt: skip
    found: dict[str, dict] = {}
    with hostile_server() as server:
        endpoint = EndpointSection(url=server.url, retries=0, price_per_million_tokens=PRICES)
        ask = partial(http.generate, model="m", endpoint=endpoint, folder=tmp_path / CALLS)
        for _ in range(2):
            stream(
                folder(tmp_path), rows, ask, lambda got: found.update({r["key"]: r for r in got}),
                title="ask", schema=REQUESTS, total=len(rows),
            )  # fmt: skip
    assert server.keys == {"Bearer sesame"} and server.calls == {"fine": 1, "nonsense": 1, "unfit": 2, "free": 1}
    assert found["fine"] == {"key": "fine", "draw": "fine's", "text": GOOD, "tokens": 100, "logprobs": "",
                             "__inference_error__": ""}  # fmt: skip
    assert found["nonsense"]["text"] == "I'd rather not." and found["free"]["tokens"] is None
    assert found["unfit"]["text"] is None and found["unfit"]["__inference_error__"] == "refused 400"
    assert error_class(found["unfit"]["__inference_error__"]) == "refused 400"


def test_a_responder_may_live_behind_an_endpoint_and_its_calls_are_counted(tmp_path, ray_cluster):
    speeches = [
        {"speech_id": w, "messages": [{"role": "user", "content": f"word {w} here"}], "split": "train"}
        for w in ("fine", "free", "unfit")
    ]
    with hostile_server() as server:
        endpoint = {"url": server.url, "retries": 0, "price_per_million_tokens": PRICES}
        responder = {"name": "away", "model": "m", "endpoint": endpoint}
        words = [f"responses.responders={json.dumps([responder])}", "responses.max_invalid_share=0.5"]
        config = load_config(None, words)
        rows = [draw_row(s, r, "away", 1) for s in speeches for r in config.responses.responders]
        stats = answer_all(folder(tmp_path), lambda: rows, len(rows), config, title="responses")
        again = answer_all(folder(tmp_path), lambda: rows, len(rows), config, title="responses")
    assert dict(server.calls) == {"fine": 1, "free": 1, "unfit": 1} and again == stats
    assert stats["ok"] == 2 and stats["failed"] == 1 and stats["calls"]["calls"] == 3
    found = {row["speech_id"]: row for row in folder(tmp_path).parts(RESPONSES, "response_id").each()}
    assert found["fine"]["responder"] == "away" and found["fine"]["text"] == GOOD and found["free"]["tokens"] is None
    assert found["unfit"]["error"] == "refused 400" and found["unfit"]["text"] is None
