"""A served run with a real engine: chat, streaming, models, scores, refusals and the crisis header over HTTP."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message as Headers
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported

import numpy as np
import pyarrow as pa
import pytest
import ray
import yaml
from pydantic import SecretStr

from psyray.engines.http import HttpRater
from psyray.engines.journal import read_totals
from psyray.errors import PsyrayError
from psyray.reward.score import RewardScorer
from psyray.rubric import Principle, Rubric
from psyray.sections.data import EndpointSection
from serve.request import ask, serve_once, serving

CLIENT = [{"role": "user", "content": "My sister moved abroad and the flat is too quiet in the evenings."}]
TOKEN = "tests-" + "0123456789abcdef" * 2
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([CLIENT[0]["content"], "what was it like to say that aloud"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_llama(folder: Path, *, labels: int | None) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    shape = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    kind = LlamaForCausalLM if labels is None else LlamaForSequenceClassification
    kind(LlamaConfig(**shape, **({} if labels is None else {"num_labels": labels}))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run whose models are tiny and random."""
    run = tmp_path_factory.mktemp("run")
    policy, reward = save_llama(run / "policy", labels=None), save_llama(run / "reward", labels=1)
    settings = {"path": str(policy), "temperature": 0.0, "top_p": 1.0, "max_tokens": 12, "system": "Be kind."}
    champion = {
        "policy": {"name": "psyray-round-1", "round": 1, **settings},
        "reward": {"name": "psyray-reward", "path": str(reward), "heads": None, "max_length": 256},
        "run": str(run),
        "id": "3f2a9c0e1b77",
    }
    (run / "champion.json").write_text(json.dumps(champion))
    engine = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "kv_cache_gib": 1}
    (run / "keys").write_text(f"tests chat,score {TOKEN}\n")
    (run / "config.yaml").write_text(yaml.safe_dump({"engine": engine}))
    return run


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """The Ray of this process: the one that is there, else a private one of two logical CPUs, as on a laptop."""
    if ray.is_initialized():
        yield
        return
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=120 * 2**20,
        log_to_driver=bool(os.environ.get("PSYRAY_WORKER_LOGS")),
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def server(served_run: Path, ray_here: None) -> Iterator[str]:
    """The address of the run behind one HTTP port."""
    # A busy machine takes long to import the engine four times over.
    words = {"run": str(served_run), "device": "cpu", "keys": str(served_run / "keys"), "per_minute": "100000"}
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
    assert (status, json.loads(text)["policy"]) == (200, "psyray-round-1")
    status, _, text = call(f"{server}/v1/models")
    assert (status, [m["id"] for m in json.loads(text)["data"]]) == (200, ["psyray-round-1"])


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
    assert headers["X-Psyray-Id"] == "3f2a9c0e1b77"
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


def test_the_best_of_several_is_the_one_that_the_reward_model_scores_highest(server: str) -> None:
    body = {"messages": CLIENT, "of": 5, "temperature": 1.5, "max_tokens": 8}
    status, headers, text = call(f"{server}/v1/chat/best", body)
    reply = json.loads(text)
    considered, picked = reply["best_of"]["considered"], reply["best_of"]["picked"]
    assert status == 200 and len(reply["choices"]) == 1 and headers["X-Psyray-Id"] == "3f2a9c0e1b77"
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
    assert text.endswith("data: [DONE]\n\n") == stream and headers["X-Psyray-Id"] == "3f2a9c0e1b77"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "messages"),
        ({"messages": []}, 422, "at least 1"),
        ({"messages": 3}, 422, "list"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": 3}]}, 422, ""),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "role 'user'"),
        ({"messages": CLIENT, "tools": 5}, 422, ""),
        ({"messages": CLIENT, "stream_options": 5}, 422, "stream_options"),
        ({"messages": CLIENT, "model": "other"}, 404, "other"),
        ({"messages": CLIENT, "temperature": -1}, 400, "temperature"),
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


def test_scores_equal_the_scorers_own(server: str, served_run: Path) -> None:
    answers = ["That sounds lonely.", "Buy a radio.", "What do the evenings look like now, since she left?"]
    items = [{"messages": CLIENT, "response": answer} for answer in answers]
    status, headers, text = call(f"{server}/reward/score", {"items": items})
    reply = json.loads(text)
    served = np.array([s["score"] for s in reply["scores"]])
    direct_NH = RewardScorer(served_run / "reward", None, max_length=256).scores([CLIENT] * 3, answers)
    np.testing.assert_allclose(served, direct_NH.mean(axis=1), rtol=1e-6)
    assert (status, reply["model"], len(set(served.round(6)))) == (200, "psyray-reward", 3)
    assert headers["X-Psyray-Id"] == "3f2a9c0e1b77"


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
    # The model computes in bfloat16, where the shape of a batch moves the last digits.
    np.testing.assert_allclose(together, alone, atol=0.02)


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


def test_one_question_is_asked_and_scored(server: str, served_run: Path) -> None:
    result = ask(server, CLIENT, 60, TOKEN)
    assert set(result) == {"question", "answer", "score", "spread", "seconds"}
    assert result["question"] == CLIENT[0]["content"] and np.isfinite(result["score"]) and result["spread"] == 0
    with pytest.raises(PsyrayError, match="Serve is in use"):
        serve_once(served_run, CLIENT)
