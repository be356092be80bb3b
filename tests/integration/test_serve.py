"""A served run with a real engine: chat, streaming, models, scores, refusals and the crisis header over HTTP."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message as Headers
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from made_ear import made_ear
from made_exports import register, save_adapter, save_run
from pydantic import SecretStr
from ray import serve

from psyray.cluster import ray_session
from psyray.config import load_config
from psyray.engines.http import HttpRater
from psyray.engines.journal import read_totals
from psyray.errors import PsyrayError
from psyray.registry import promote
from psyray.reward.score import RewardScorer
from psyray.rubric import Principle, Rubric, load_rubric
from psyray.sections.data import EndpointSection
from serve.access import Limits, read_keys
from serve.bring_up import LOGGING
from serve.ear import Ask
from serve.guard import read_replies
from serve.ingress import Ingress
from serve.request import ask, free_port, serving

CLIENT = [{"role": "user", "content": "My sister moved abroad and the flat is too quiet in the evenings."}]
TOKEN, OTHER = "tests-" + "0123456789abcdef" * 2, "other-" + "0123456789abcdef" * 2
FIRST, SECOND = "3f2a9c0e1b77", "8e5d4c3b2a10"  # the exports of two runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two finished runs with tiny random models, two LoRA adapters on the first, and their registry."""
    home = tmp_path_factory.mktemp("runs")
    first, second = save_run(home / "first", 1, FIRST), save_run(home / "second", 2, SECOND)
    for seed, name in enumerate(("warm", "brief")):
        save_adapter(first / "policy", home / name, seed)
    register(f"sqlite:///{home / 'mlflow.db'}", first, second)
    (home / "keys").write_text(f"tests chat,score {TOKEN}\nother chat,score {OTHER}\n")
    return home


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """The Ray of this process: the one that is there, else a private one.

    An engine takes one logical CPU and a reward model half of one; a champion comes up beside the one before.
    """
    with ray_session(load_config(None, ["cluster.logical_cpus=3"])):
        yield


@pytest.fixture(scope="module")
def direct() -> int:
    """The port that the application answers itself."""
    return free_port()


@pytest.fixture(scope="module")
def server(home: Path, ray_here: None, direct: int) -> Iterator[str]:
    """The registry's champion, and two adapters beside it, behind one HTTP port and one of its own."""
    words = {"runs": str(home), "beside": f"warm={home / 'warm'},brief={home / 'brief'}", "follow_s": "2"}
    words |= {"device": "cpu", "keys": str(home / "keys"), "per_minute": "1000000", "direct": str(direct)}
    words |= {"reward_replicas": "1-2", "reward_ongoing": "4", "up_after_s": "5", "down_after_s": "30"}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        # A busy machine takes long to import the engine four times over.
        with serving(words, start_timeout_s=480) as url:
            yield url


def call(url: str, body: Any = None, token: str = TOKEN) -> tuple[int, Headers, str]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as reply:
            return reply.status, reply.headers, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def test_health_and_models(server: str) -> None:
    status, _, text = call(f"{server}/healthz")
    assert (status, json.loads(text)) == (200, {"status": "ok"})
    status, _, text = call(f"{server}/v1/models")
    assert (status, [m["id"] for m in json.loads(text)["data"]]) == (
        200,
        ["champion", "psyray-round-1", "warm", "brief"],
    )
    card = json.loads(call(f"{server}/v1/models/champion")[2])
    assert (card["metadata"]["name"], card["metadata"]["export"]) == ("psyray-round-1", FIRST)
    assert call(f"{server}/v1/models/other")[0] == 404


def test_only_a_known_key_is_answered(server: str) -> None:
    for path, body in (("/v1/models", None), ("/v1/chat/completions", {"messages": CLIENT}), ("/reward/score", {})):
        status, headers, text = call(server + path, body, token="x" * 32)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert json.loads(text)["error"]["message"] == "unauthorized"
    assert call(f"{server}/healthz", token="none")[0] == 200
    status, _, text = call(f"{server}/v1/chat/completions", {"messages": CLIENT * 65})
    assert status == 422 and "at most 64" in text


def test_chat_uses_the_policys_defaults(server: str) -> None:
    status, headers, text = call(f"{server}/v1/chat/completions", {"messages": CLIENT})
    reply = json.loads(text)
    assert status == 200 and reply["model"] == "psyray-round-1" and "X-Psyray-Crisis" not in headers
    assert headers["X-Psyray-Id"] == FIRST
    assert reply["usage"]["completion_tokens"] <= 12
    own = {"messages": [{"role": "system", "content": "Be kind."}, *CLIENT], "temperature": 0, "max_tokens": 12}
    again = json.loads(call(f"{server}/v1/chat/completions", own)[2])
    assert again["choices"][0]["message"]["content"] == reply["choices"][0]["message"]["content"]
    assert again["usage"]["prompt_tokens"] == reply["usage"]["prompt_tokens"]


def test_streamed_chat_equals_the_whole(server: str) -> None:
    whole = json.loads(call(f"{server}/v1/chat/completions", {"messages": CLIENT})[2])
    status, headers, text = call(f"{server}/v1/chat/completions", {"messages": CLIENT, "stream": True})
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream") and lines[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1]]
    assert len(deltas) > 1 and "".join(deltas) == whole["choices"][0]["message"]["content"]


def test_the_applications_own_port_answers_alike(server: str, direct: int) -> None:
    own = f"http://127.0.0.1:{direct}"
    asked = {"messages": [{"role": "user", "content": "I dread Mondays."}], "temperature": 0, "max_tokens": 6}
    answers = [call(f"{url}/v1/chat/completions", asked) for url in (server, own)]
    assert [status for status, _, _ in answers] == [200, 200]
    texts = [json.loads(text)["choices"][0]["message"]["content"] for _, _, text in answers]
    assert texts[0] == texts[1]
    assert answers[0][1]["X-Psyray-Id"] == answers[1][1]["X-Psyray-Id"]
    status, _, events = call(f"{own}/v1/chat/completions", {**asked, "stream": True})
    assert status == 200 and events.rstrip().endswith("data: [DONE]")
    assert call(f"{own}/v1/models", token="wrong-" + "x" * 20)[0] == 401
    assert call(f"{own}/-/routes")[0] != 200  # what Serve's proxy tells of the cluster


def test_client_text_is_written_down_where_that_was_asked_for_and_in_no_log(
    server: str, home: Path, tmp_path: Path
) -> None:
    """A second port to the same engines keeps it; neither port leaves a word in what Ray and Serve write."""
    keys, keeper = read_keys(home / "keys"), serve.get_deployment_handle("Keeper", "psyray")
    port = serve.deployment(serve.ingress()(Ingress), name="Ingress", ray_actor_options={"num_cpus": 0})
    kept = port.bind(keeper, keys, Limits(per_minute=1_000), read_replies(None), 60.0, None, tmp_path / "said")
    serve.run(kept, name="kept", route_prefix="/kept", logging_config=LOGGING)
    words = "The quokka upstairs practises the theremin."
    asked = {"messages": [{"role": "user", "content": words}], "max_tokens": 6}
    crisis = {"messages": [{"role": "user", "content": f"{words} I want to die."}]}
    scored = {"items": [{"messages": asked["messages"], "response": words}]}
    answers = []
    for url in (server, f"{server}/kept"):
        for path, body in (
            ("chat/completions", asked),
            ("chat/completions", {**asked, "stream": True}),
            ("chat/best", {**asked, "of": 2, "temperature": 1}),
            ("chat/completions", crisis),
            ("chat/completions", {**asked, "max_tokens": 999_999}),  # refused
        ):
            answers.append(call(f"{url}/v1/{path}", body))
        answers.append(call(f"{url}/reward/score", scored))
    assert [status for status, _, _ in answers] == [200, 200, 200, 200, 422, 200] * 2
    serve.delete("kept")
    [file] = (tmp_path / "said").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    chat, best_of, score = "/v1/chat/completions", "/v1/chat/best", "/reward/score"
    assert [row["route"] for row in rows] == [chat, chat, best_of, chat, score]
    whole, stream, best, reply, scores = rows
    assert {row["key"] for row in rows} == {"tests"} and whole["messages"] == stream["messages"] == asked["messages"]
    assert [whole["id"], whole["answers"][0]] == [
        json.loads(answers[6][2])["id"],
        json.loads(answers[6][2])["choices"][0]["message"]["content"],
    ]
    assert stream["answers"] == whole["answers"] and stream["whole"] and len(best["best_of"]["considered"]) == 2
    assert (whole["flagged"], reply["flagged"], reply["messages"]) == (False, True, crisis["messages"])
    assert scores["items"] == scored["items"] and len(scores["scores"]) == 1
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = [log for log in session.glob("logs/**/*") if log.is_file()]
    assert len(logs) > 10 and any("kept in" in log.read_text(errors="replace") for log in logs)
    for log in logs:
        assert not re.search("quokka|theremin", log.read_text(errors="replace")), log


def test_the_best_of_several_is_the_one_that_the_reward_model_scores_highest(server: str) -> None:
    body = {"messages": CLIENT, "of": 5, "temperature": 1.5, "max_tokens": 8}
    status, headers, text = call(f"{server}/v1/chat/best", body)
    reply = json.loads(text)
    considered, picked = reply["best_of"]["considered"], reply["best_of"]["picked"]
    assert status == 200 and len(reply["choices"]) == 1 and headers["X-Psyray-Id"] == FIRST
    assert len({c["text"] for c in considered}) > 1 and picked == np.argmax([c["score"] for c in considered])
    assert reply["choices"][0]["message"]["content"] == considered[picked]["text"]
    items = [{"messages": CLIENT, "response": c["text"]} for c in considered]
    scored = json.loads(call(f"{server}/reward/score", {"items": items})[2])["scores"]
    np.testing.assert_allclose([s["score"] for s in scored], [c["score"] for c in considered], rtol=1e-6)
    for wrong, words in (
        ({"of": 1}, "of"),
        ({"of": 99}, "of"),
        ({"caution": -1}, "caution"),
        ({"messages": 3}, "messages"),
    ):
        status, _, text = call(f"{server}/v1/chat/best", body | wrong)
        assert status == 422 and words in json.loads(text)["error"]["message"]
    last = [*CLIENT, {"role": "assistant", "content": "I see."}]
    assert call(f"{server}/v1/chat/best", {"messages": last})[0] == 422


@pytest.mark.parametrize("stream", [False, True])
def test_crisis_words_are_answered_by_the_fixed_reply_and_marked(server: str, stream: bool) -> None:
    words = [{"role": "user", "content": [{"type": "text", "text": "Some nights I want to kill myself."}]}]
    status, headers, text = call(f"{server}/v1/chat/completions", {"messages": words, "stream": stream})
    assert (status, headers["X-Psyray-Crisis"]) == (200, "true") and "findahelpline.com" in text
    assert text.endswith("data: [DONE]\n\n") == stream and headers["X-Psyray-Id"] == FIRST


def test_a_second_ear_flags_what_no_phrase_does(server: str, home: Path) -> None:
    """A second port to the same engines asks it, once before any client comes."""
    keys, keeper = read_keys(home / "keys"), serve.get_deployment_handle("Keeper", "psyray")
    port = serve.deployment(serve.ingress()(Ingress), name="Ingress", ray_actor_options={"num_cpus": 0})
    with made_ear() as ear:
        ear.replies = {"allowed to leave": "yes"}
        ask = Ask(ear.url, "listener", "key-of-the-ear")
        asking = port.bind(keeper, keys, Limits(), read_replies(None), 60.0, None, None, ask)
        serve.run(asking, name="asking", route_prefix="/asking", logging_config=LOGGING)
        for words, by in (("I am allowed to leave now.", "model"), ("The flat is too quiet.", None)):
            said = [{"role": "user", "content": words}]
            status, headers, text = call(f"{server}/asking/v1/chat/completions", {"messages": said, "max_tokens": 6})
            assert (status, headers["X-Psyray-Crisis-By"]) == (200, by) and ("findahelpline.com" in text) == bool(by)
        assert json.loads(call(f"{server}/asking/healthz")[2]) == {"status": "ok", "ear": "ok"}
        serve.delete("asking")
        assert len(ear.asked) == 3 and ear.headers[0]["Authorization"] == "Bearer key-of-the-ear"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "messages"),
        ({"messages": []}, 422, "at least 1"),
        ({"messages": 3}, 422, "list"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": 3}]}, 422, ""),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 422, "role 'user'"),
        ({"messages": CLIENT, "tools": []}, 422, "tools: Extra inputs are not permitted"),
        ({"messages": CLIENT, "stream_options": 5}, 422, "stream_options"),
        ({"messages": CLIENT, "model": "other"}, 404, "psyray-round-1, warm, brief"),
        ({"messages": CLIENT, "temperature": -1}, 422, "temperature"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "context length"),
    ],
)
def test_bad_chats_are_refused_in_openais_format(server: str, body: Any, status: int, words: str) -> None:
    got, _, text = call(f"{server}/v1/chat/completions", body)
    error = json.loads(text)["error"]
    assert got == status and words in error["message"], text


def test_other_origins_get_no_permission(server: str) -> None:
    request = urllib.request.Request(
        f"{server}/v1/models", headers={"Origin": "https://example.org", "Authorization": f"Bearer {TOKEN}"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as reply:
        assert not [name for name in reply.headers if name.lower().startswith("access-control")]


def test_scores_spread_and_principles_equal_offline_scoring(server: str, home: Path) -> None:
    answers = ["That sounds lonely.", "Buy a radio.", "What do the evenings look like now, since she left?"]
    longer = [*CLIENT, {"role": "assistant", "content": "I see."}, {"role": "user", "content": "Do you?"}]
    conversations = [CLIENT, CLIENT, longer]
    items = [{"messages": m, "response": answer} for m, answer in zip(conversations, answers, strict=True)]
    status, headers, text = call(f"{server}/reward/score", {"items": items})
    reply = json.loads(text)
    scorer = RewardScorer(home / "first/reward", home / "first/heads.npz", max_length=256)
    features_ND = scorer.features(conversations, answers)
    direct_NH, ratings = scorer.heads.scores(features_ND), scorer.heads.ratings(features_ND)
    served = np.array([[s["score"], s["spread"]] for s in reply["scores"]])
    direct = np.stack([direct_NH.mean(axis=1), direct_NH.std(axis=1)], axis=1)
    np.testing.assert_allclose(served, direct, atol=0.06)  # bfloat16 by vLLM and by transformers
    assert (status, reply["model"], len(set(served[:, 0].round(6)))) == (200, "psyray-reward", 3)
    assert min(served[:, 1]) > 0 and headers["X-Psyray-Id"] == FIRST
    for score, rating in zip(reply["scores"], ratings or [], strict=True):
        assert list(score["principles"]) == load_rubric("counselling").keys and len(rating) == 7
        assert score["principles"] == pytest.approx(rating, rel=0.02, abs=0.06)  # random heads, whose ratings reach 12


def test_requests_at_once_get_their_own_scores(server: str) -> None:
    answers = [f"I hear how quiet it is{'.' * n}" for n in range(8)]
    bodies = [{"items": [{"messages": CLIENT, "response": answer}]} for answer in answers]

    def score(body: Any) -> float:
        status, _, text = call(f"{server}/reward/score", body)
        assert status == 200, text
        return float(json.loads(text)["scores"][0]["score"])

    alone = [score(body) for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(score, bodies))
    # The model computes in bfloat16, where the shape of a batch moves the last digits; the heads' weights are about 1.
    np.testing.assert_allclose(together, alone, atol=0.2)


def test_bad_scores_say_where(server: str) -> None:
    body = {"items": [{"messages": CLIENT, "response": "fine"}, {"messages": CLIENT, "response": ""}]}
    status, _, text = call(f"{server}/reward/score", body)
    (detail,) = json.loads(text)["detail"]
    assert (
        status == 422 and detail["loc"] == ["body", "items", 1, "response"] and "at least 1 character" in detail["msg"]
    )
    assert CLIENT[0]["content"] not in text
    assert call(f"{server}/reward/score", {"items": []})[0] == 422
    assert call(f"{server}/nothing/here")[0] == 403  # what is not there is nobody's to know


def test_our_own_endpoint_serves_our_own_http_judge(server: str, tmp_path: Path) -> None:
    # A short rubric, since the whole question has to fit into the tiny model's context.
    principle = Principle("empathy", "Empathy", 1, "Takes up the feeling.")
    rubric = Rubric("short", 1, 5, "client", (principle,), "{conversation} {response}", 'JSON: {"empathy": 1-5}')
    endpoint = EndpointSection(
        url=f"{server}/v1", retries=0, concurrency=2, price_per_million_tokens=(1.0, 1.0), max_cost=1.0
    )
    rater = HttpRater(rubric, endpoint, "psyray-round-1", 12, SecretStr(TOKEN), tmp_path)
    answers = ["That sounds lonely.", "Buy a radio.", "word " * 2000]
    rows = [{"key": str(i), "messages": CLIENT, "response": answer} for i, answer in enumerate(answers)]
    (table,) = rater(pa.Table.from_pylist(rows))
    rater.close()
    found = {row["key"]: row for row in table.to_pylist()}
    assert found["2"]["error"] == "refused 400"  # longer than the context
    for key in "01":  # a random model says nothing that could be read
        assert found[key]["ratings"] == "" and found[key]["error"].startswith("not json: ") and found[key]["cost"] > 0
    totals = read_totals(tmp_path)
    assert (totals.calls, totals.lost, totals.unpriced) == (3, 0, 0)
    assert totals.prompt_tokens > 20 and 0 < totals.completion_tokens <= 24
    assert totals.cost == pytest.approx((totals.prompt_tokens + totals.completion_tokens) / 1e6)


def test_one_question_is_asked_and_scored(server: str, home: Path) -> None:
    result = ask(server, CLIENT, 60, TOKEN)
    assert set(result) == {"question", "answer", "score", "spread", "seconds"}
    assert result["question"] == CLIENT[0]["content"] and np.isfinite(result["score"]) and result["spread"] > 0
    with pytest.raises(PsyrayError, match="Serve is in use"), serving({"run": str(home / "first")}):
        pass


def test_adapters_share_the_engine_and_a_request_names_who_answers(server: str, home: Path) -> None:
    """Asked at once, each answers as it does alone; the plain policy too, which wears no adapter."""

    def says(name: str) -> str:
        status, _, text = call(f"{server}/v1/chat/completions", {"messages": CLIENT, "model": name})
        reply = json.loads(text)
        assert (status, reply["model"]) == (200, "psyray-round-1" if name == "champion" else name), text
        return str(reply["choices"][0]["message"]["content"])

    names = ["champion", "psyray-round-1", "warm", "brief"]
    alone = {name: says(name) for name in names}
    assert alone["champion"] == alone["psyray-round-1"] and len(set(alone.values())) == 3
    with ThreadPoolExecutor(8) as pool:
        for name, said in zip(names * 4, pool.map(says, names * 4), strict=True):
            assert said == alone[name]
    assert sum(name.startswith("psyray.policy.") for name in serve.status().applications) == 1


def test_hostile_requests_break_nothing_and_learn_nothing(server: str) -> None:
    import hostile

    report = hostile.attack(server, (TOKEN, OTHER), 400)
    assert not report.wrong, report.wrong[:10]
    assert report.statuses.total() > 350 and report.statuses[422] > 100 and report.statuses[200] > 5
    assert call(f"{server}/healthz")[0] == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"X-Request-Id: \xff", b"400"),
        (b"X-\xff: 1", b"400"),
        (b"X-Session-Id: \xff", b"200"),
        (b"serve_multiplexed_model_id: \xff", b"200"),
        (b"X-Request-Timeout-Seconds: \xff", b"200"),
        (b"X-Request-Timeout-Seconds: 0.0001", b"200"),
        (b"X-Request-Disconnect-Disabled: \xff", b"200"),
    ],
)
def test_no_header_steers_or_breaks_a_port(server: str, direct: int, header: bytes, status: bytes) -> None:
    assert status_of(server, header) == status
    assert status_of(f"http://127.0.0.1:{direct}", header) in (b"200", b"400")  # no proxy decodes headers there


def test_what_serve_tells_of_the_cluster_is_told_to_nobody_outside(server: str, direct: int) -> None:
    status, _, text = call(f"{server}/-/routes")
    assert status == 404 and "psyray" not in text
    assert call(f"{server}/-/healthz", token="none")[::2] == (200, "success")  # for Kubernetes


def status_of(url: str, header: bytes) -> bytes:
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=60) as line:
        key = f"Authorization: Bearer {TOKEN}".encode()
        line.sendall(
            b"\r\n".join([b"GET /v1/models HTTP/1.1", b"Host: x", key, header, b"Connection: close", b"", b""])
        )
        return line.makefile("rb").readline().split()[1]


def test_crises_and_the_champions_trouble_reach_prometheus(server: str) -> None:
    words = [{"role": "user", "content": "Some nights I want to kill myself."}]
    assert call(f"{server}/v1/chat/completions", {"messages": words})[0] == 200
    tags = r'(?=.*guard="reply")(?=.*kind="self-harm")(?=.*by="phrases")'
    counted = re.compile(rf"^ray_psyray_crisis_requests_total\{{{tags}.*\}} [1-9]", re.M)
    trouble = re.compile(r"^ray_psyray_champion_trouble\{.*\} 0\.0$", re.M)
    deadline, text = time.monotonic() + 90, ""
    while time.monotonic() < deadline and not (counted.search(text) and trouble.search(text)):
        time.sleep(1)  # Ray's processes report every few seconds
        text = call(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics")[2]
    assert counted.search(text) and trouble.search(text) and "kill myself" not in text


def engines() -> dict[str, psutil.Process]:
    """The engines' own processes by the title of the replica that each belongs to; fails where one has a worker."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            assert not title.startswith("VLLM::Worker"), "an engine that hands its work to another process"
            if title.startswith("VLLM::EngineCore"):
                found[" ".join(process.parent().cmdline())] = process
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return found


def test_a_reward_engine_that_dies_is_replaced(server: str) -> None:
    [mine] = [title for title in engines() if "RewardServer" in title]
    assert len(engines()) == 2  # the adapters share the policy's
    body = {"items": [{"messages": CLIENT, "response": "That sounds lonely."}]}
    _, _, before = call(f"{server}/reward/score", body)
    engines()[mine].kill()
    seen, deadline = [0], time.monotonic() + 240
    while seen[-1] != 200 and time.monotonic() < deadline:
        status, _, after = call(f"{server}/reward/score", body)
        seen.append(status)
        time.sleep(0.5)
    assert seen[-1] == 200 and set(seen[1:-1]) == {503} and json.loads(after) == json.loads(before)


class Asking(threading.Thread):
    """A client that asks one route again and again and remembers what came back."""

    def __init__(self, url: str, body: Any, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.url, self.body, self.stop_now = url, body, stop
        self.seen: list[tuple[int, str]] = []

    def run(self) -> None:
        while not self.stop_now.is_set():
            status, headers, text = call(self.url, self.body)
            whole = not self.body.get("stream") or text.endswith("data: [DONE]\n\n")
            self.seen.append((status if whole else 0, headers["X-Psyray-Id"]))
            self.stop_now.wait(0.3)  # the next engine needs the cores too


def test_load_brings_a_second_replica_and_its_end_takes_it_away(server: str) -> None:
    """No request is lost meanwhile: a second reward model comes when one has more than four requests under way."""
    [app] = [name for name in serve.status().applications if name.startswith("psyray.reward.")]

    def replicas(*states: str) -> int:
        known = serve.status().applications[app].deployments["RewardServer"].replica_states
        return sum(known.get(state, 0) for state in states)

    def until(count: int, *states: str) -> bool:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and replicas(*states) != count:
            time.sleep(0.5)
        return replicas(*states) == count

    items = [{"messages": CLIENT, "response": f"That sounds lonely, {n} times over."} for n in range(64)]
    loud, quiet = threading.Event(), threading.Event()
    many = [Asking(f"{server}/reward/score", {"items": items}, loud) for _ in range(16)]
    one = Asking(f"{server}/reward/score", {"items": items[:1]}, quiet)
    assert replicas("RUNNING") == 1
    for client in (*many, one):
        client.start()
    assert until(2, "RUNNING", "STARTING")
    loud.set()  # the mean of half a minute keeps it wanted, and its start has the cores
    assert until(2, "RUNNING")
    assert until(1, "RUNNING")
    quiet.set()
    for client in (*many, one):
        client.join(120)
        assert client.seen and {status for status, _ in client.seen} == {200}


def test_another_champion_takes_over_without_a_lost_request(server: str, home: Path) -> None:
    stop, chat = threading.Event(), f"{server}/v1/chat/completions"
    bodies = [(chat, {"messages": CLIENT, "model": "champion"}), (chat, {"messages": CLIENT, "stream": True})]
    scored = {"items": [{"messages": CLIENT, "response": "That sounds lonely."}]}
    clients = [Asking(url, body, stop) for url, body in (*bodies, (f"{server}/reward/score", scored))]
    for client in clients:
        client.start()
    tracking = f"sqlite:///{home / 'mlflow.db'}"
    before = set(serve.status().applications)
    assert promote(str(home / "second"), home, tracking) == {"psyray-policy": "2", "psyray-reward": "2"}
    [engine] = [name for name in before if name.startswith("psyray.policy.")]  # stays for the adapters on it
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and before & set(serve.status().applications) != {"psyray", engine}:
        time.sleep(0.5)
    stop.set()
    for client in clients:
        client.join(120)
        assert {status for status, _ in client.seen} == {200}
        ids = [export for _, export in client.seen]
        # Whoever was asked before the change answers before those asked after it: one client, one question at a time.
        assert ids == sorted(ids, key=[FIRST, SECOND].index) and set(ids) == {FIRST, SECOND}
    assert before & set(serve.status().applications) == {"psyray", engine}
    models = json.loads(call(f"{server}/v1/models")[2])["data"]
    assert [m["id"] for m in models] == ["champion", "psyray-round-2", "warm", "brief"]
