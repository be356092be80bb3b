"""Responses: draws of responders for speeches, answered by vLLM on Ray Data."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from psyray.config import Config, Responder, Sampling
from psyray.data.quality import LOOP_SHARE, repetition
from psyray.engines import vllm
from psyray.errors import PsyrayError
from psyray.models import model_identity, resolve_model
from psyray.records import RESPONSES, Message, Row, Status, content_id, response_id, rows
from psyray.run import Artifact, Folder, Run
from psyray.stream import share, stream


def responses_stage(run: Run, config: Config, speeches: Artifact) -> Artifact:
    """The stage `responses`: `k` responders drawn for each training and test speech."""
    responders = config.responses.responders
    identities = {r.name: content_id(r.model_dump(), model_identity(r.model)) for r in responders}
    settings = {
        "k": config.responses.k,
        "responders": identities,
        "seed": config.run.seed,
        **engine_identity(config),
    }

    def make(folder: Folder) -> Mapping[str, Any]:
        draws = [
            draw_row(speech, responder, identities[responder.name], seed)
            for speech in speeches.rows()
            for responder, seed in draw(speech["speech_id"], responders, config.responses.k, config.run.seed)
        ]
        return answer_all(folder, draws, config, title="responses")

    return run.stage("responses", settings, [speeches], make)


def engine_identity(config: Config) -> dict[str, Any]:
    """The engine's settings that a result depends on."""
    return {"max_model_len": config.engine.max_model_len, "dtype": config.engine.dtype}


def draw(speech: str, responders: Sequence[Responder], k: int, seed: int) -> list[tuple[Responder, int]]:
    """`k` responders and sampling seeds for a speech: no responder twice before all had a turn."""
    order = random.Random(f"{seed}/{speech}")
    drawn: list[Responder] = []
    while len(drawn) < k:
        drawn.extend(order.sample(list(responders), len(responders)))
    return [(responder, seed * 1_000_003 + i) for i, responder in enumerate(drawn[:k])]


def draw_row(speech: Row, responder: Sampling, identity: str, seed: int, name: str = "") -> Row:
    """One draw before it is answered: a RESPONSES row with `prompt` and `sampling` beside it."""
    key = response_id(speech["speech_id"], identity, seed)
    return {
        "response_id": key,
        "speech_id": speech["speech_id"],
        "messages": speech["messages"],
        "split": speech["split"],
        "responder": name or getattr(responder, "name", ""),
        "model": responder.model,
        "seed": seed,
        "prompt": with_system(speech["messages"], responder.system),
        "sampling": {
            "temperature": responder.temperature,
            "top_p": responder.top_p,
            "max_tokens": responder.max_tokens,
            "stop": responder.stop,
            "seed": int(content_id(key)[:7], 16),
        },
    }


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """The conversation under a system prompt, unless it brings its own."""
    if not system or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def answer_all(folder: Folder, draws: list[Row], config: Config, *, title: str, model: str = "") -> Mapping[str, Any]:
    """Answer the draws that have no row yet, one engine start for each model, and return the numbers of all.

    PsyrayError where more than `responses.max_invalid_share` failed.
    """
    parts = folder.parts(RESPONSES, "response_id")
    todo = parts.todo(draws)
    by_id = {row["response_id"]: row for row in draws}
    for name in sorted({row["model"] for row in todo}):
        requests = [
            {"key": row["response_id"], "messages": row["prompt"], "sampling": json.dumps(row["sampling"])}
            for row in todo
            if row["model"] == name
        ]
        source = model or resolve_model(name)
        stream(
            folder,
            requests,
            partial(vllm.generate, model=source, engine=config.engine, wait_s=config.cluster.wait_s),
            lambda results: parts.append(_response(by_id[r["key"]], r) for r in results),
            title=title,
            done=len(parts.ids),
        )
    found = rows(parts.table())
    bad = [row for row in found if row["status"] != Status.OK]
    ceiling = config.responses.max_invalid_share
    if found and len(bad) / len(found) > ceiling:
        aside = parts.set_aside({row["response_id"] for row in bad})
        raise PsyrayError(
            f"{title}: {len(bad)} of {len(found)} responses failed, more than responses.max_invalid_share "
            f"({ceiling:.0%}). The first says: {bad[0]['error'][:300]}. They are in {aside}; mend the cause and run "
            "the same command again: the good ones are kept, the failed ones are tried anew"
        )
    parts.finish()
    return summary(found)


def _response(draw: Row, result: Row) -> Row:
    error = result.get("__inference_error__") or ""
    text = (result.get("text") or "").strip()
    status = Status.FAILED if error else Status.OK if text else Status.INVALID
    return draw | {
        "text": text if status is Status.OK else None,
        "tokens": result.get("tokens"),
        "truncated": result.get("tokens") is not None and result["tokens"] >= draw["sampling"]["max_tokens"],
        "repeated": repetition(text),
        "status": status,
        "error": error or ("" if text else "empty answer"),
        "raw_text": result.get("text"),
        "attempts": 1,
    }


def summary(responses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and shares over response rows."""
    good = [row for row in responses if row["status"] == Status.OK]
    return {
        "ok": len(good),
        "failed": len(responses) - len(good),
        "truncated_share": share(row["truncated"] for row in good),
        "repeated_share": share(row["repeated"] >= LOOP_SHARE for row in good),
        "mean_words": sum(len(row["text"].split()) for row in good) / len(good) if good else 0.0,
    }
