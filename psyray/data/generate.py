"""Responses: draws of responders for speeches, answered on Ray Data by vLLM or by a responder's endpoint."""

from __future__ import annotations

import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from psyray.ceiling import Ceiling, check_ceiling
from psyray.config import Config
from psyray.data.quality import LOOP_SHARE, repetition
from psyray.engines import http, journal, vllm
from psyray.engines.thinking import CUT_OFF, said
from psyray.models import model_identity, resolve_model
from psyray.records import MESSAGES, RESPONSES, Message, Row, Status, content_id, response_id
from psyray.run import Artifact, Folder, Parts, Run
from psyray.sections.data import EndpointSection, EngineSection, Responder, Sampling, unusual
from psyray.stream import CALLS, stream


def responses_stage(run: Run, config: Config, speeches: Artifact) -> Artifact:
    """The stage `responses`: `k` responders drawn for each training and test speech."""
    responders = config.responses.responders
    identities = {r.name: identity(r, config.engine) for r in responders}
    settings = {
        "k": config.responses.k,
        "responders": identities,
        "seed": config.run.seed,
    }

    def draws() -> Iterator[Row]:
        for speech in (row for row in speeches.each() if not row["answered"]):
            for responder, seed in draw(speech["speech_id"], responders, config.responses.k, config.run.seed):
                yield draw_row(speech, responder, identities[responder.name], seed)

    def make(folder: Folder) -> Mapping[str, Any]:
        count = sum(not row["answered"] for row in speeches.each(["answered"])) * config.responses.k
        return answer_all(folder, draws, count, config, title="responses")

    return run.stage("responses", settings, [speeches], make)


def identity(responder: Responder, engine: EngineSection) -> str:
    """What a responder's answers depend on."""
    asked = responder.model_dump(exclude={"engine", "endpoint"})
    if responder.endpoint:
        return content_id(asked, responder.endpoint.url, *unusual(responder.endpoint, "body"))
    files = [model_identity(name) for name in (responder.model, responder.adapter) if name]
    return content_id(asked, files, engine_identity(own_engine(engine, responder.engine)))


def engine_identity(engine: EngineSection) -> dict[str, Any]:
    """The engine's settings that a result depends on."""
    told = {"template": engine.template} if unusual(engine, "template") else {}
    return {"max_model_len": engine.max_model_len, "dtype": engine.dtype, **told}


def draw(speech: str, responders: Sequence[Responder], k: int, seed: int) -> list[tuple[Responder, int]]:
    """`k` responders and sampling seeds for a speech: no responder twice before all had a turn."""
    order = random.Random(f"{seed}/{speech}")
    drawn: list[Responder] = []
    while len(drawn) < k:
        drawn.extend(order.sample(list(responders), len(responders)))
    return [(responder, seed * 1_000_003 + i) for i, responder in enumerate(drawn[:k])]


DRAWN = ("response_id", "speech_id", "messages", "split", "crisis", "responder", "model", "seed")


def draw_row(speech: Row, responder: Sampling, identity: str, seed: int, name: str = "") -> Row:
    """One draw before it is answered: the columns `DRAWN` of RESPONSES, and what its engine needs beside them."""
    key = response_id(speech["speech_id"], identity, seed)
    own: dict[str, Any] = {}
    if isinstance(responder, Responder):
        own = {"endpoint": responder.endpoint.model_dump(mode="json")} if responder.endpoint else responder.engine
    return {
        "response_id": key,
        "speech_id": speech["speech_id"],
        "messages": speech["messages"],
        "split": speech["split"],
        "crisis": speech.get("crisis"),
        "responder": name or getattr(responder, "name", ""),
        "model": responder.model,
        "seed": seed,
        "adapter": getattr(responder, "adapter", None) or "",
        "engine": json.dumps(own, sort_keys=True),
        "prompt": with_system(speech["messages"], responder.system),
        "sampling": {
            "temperature": responder.temperature,
            "top_p": responder.top_p,
            "max_tokens": responder.max_tokens,
            **({"stop": responder.stop} if responder.stop else {}),
            "seed": int(content_id(key)[:7], 16),
        },
    }


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """The conversation under a system prompt, unless it brings its own."""
    if not system or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


REQUESTS = pa.schema(
    [("key", pa.string()), ("messages", MESSAGES), *((n, pa.string()) for n in ("sampling", "adapter", "draw"))]
)
TOO_LONG = ("maximum model length", "maximum context length", "longer than the maximum")  # as vLLM says it


def answer_all(
    folder: Folder,
    draws: Callable[[], Iterable[Row]],
    count: int,
    config: Config,
    *,
    title: str,
    model: str = "",
    may_be_silent: bool = False,
) -> Mapping[str, Any]:
    """Answer the draws that have no row yet, one engine start for each model, and return the numbers of all.

    `draws()` gives the same `count` rows each time; `model` is where the one model of all draws lies, if it is not
    to be looked up. PsyrayError where more than `responses.max_invalid_share` failed; an empty answer is a failure
    unless the model `may_be_silent`.
    """
    parts = folder.parts(RESPONSES, "response_id")
    tries, begun = config.responses.retries + 1, list[EngineStart]()
    for attempt in range(1, tries + 1):
        for start, adapters in starts(draws(), parts).items():
            begun.append(EngineStart())
            stream(
                folder,
                (request(row) for row in draws() if start_of(row) == start and row["response_id"] not in parts.ids),
                engine_for(start, adapters, config, folder, model),
                partial(keep, parts, attempt, begun[-1], final=attempt == tries),
                title=title,
                schema=REQUESTS,
                total=count,
                done=len(parts.ids),
            )
    check_share(parts, config.responses.max_invalid_share, title, may_be_silent)
    parts.finish()
    started = {"engine_start_s": round(sum(one.seconds for one in begun), 1)}
    return summary(parts.each(SUMMED)) | started | journal.stats(folder.path / CALLS)


class EngineStart:
    """How long an engine takes before it works: until its first answers come, less what the slowest of them took."""

    def __init__(self) -> None:
        self.asked, self.seconds, self._known = time.monotonic(), 0.0, False

    def note(self, results: Sequence[Row]) -> None:
        """See results as they come; only the first with an engine's own time count, and an endpoint's have none."""
        took = [row["seconds"] for row in results if (row.get("seconds") or 0) > 0]
        if took and not self._known:
            self.seconds, self._known = max(0.0, time.monotonic() - self.asked - max(took)), True


Start = tuple[str, str]  # a model, and as JSON its endpoint or its settings over those of the section `engine`


def start_of(draw: Row) -> Start:
    """The engine start that answers a draw."""
    return draw["model"], draw["engine"]


def engine_for(
    start: Start, adapters: Sequence[str], config: Config, folder: Folder, model: str
) -> Callable[[Any], Any]:
    """What answers a data set of requests: a vLLM engine, or the endpoint that the responder names."""
    own = json.loads(start[1])
    if "endpoint" in own:
        endpoint, calls = EndpointSection.model_validate(own["endpoint"]), folder.path / CALLS / content_id(start)
        return partial(http.generate, model=start[0], endpoint=endpoint, folder=calls)
    return partial(
        vllm.generate,
        model=model or resolve_model(start[0]),
        engine=own_engine(config.engine, own),
        wait_s=config.cluster.wait_s,
        adapters=adapters,
    )


def starts(draws: Iterable[Row], parts: Parts) -> dict[Start, list[str]]:
    """The engine starts that the draws without a row need, each with the adapters that its model wears."""
    found: dict[Start, set[str]] = defaultdict(set)
    for draw in draws:
        if draw["response_id"] not in parts.ids:
            found[start_of(draw)].add(draw["adapter"])
    return {start: sorted(filter(None, found[start])) for start in sorted(found)}


def own_engine(engine: EngineSection, own: Mapping[str, Any]) -> EngineSection:
    """The section `engine` with a responder's own settings over it."""
    return EngineSection.model_validate(engine.model_dump() | dict(own))


def request(draw: Row) -> Row:
    """What an engine is asked for a draw; the draw itself goes along, so that the answer finds its place."""
    kept = {key: draw[key] for key in (*DRAWN, "engine")} | {"max_tokens": draw["sampling"]["max_tokens"]}
    return {
        "key": draw["response_id"],
        "messages": draw["prompt"],
        "sampling": json.dumps(draw["sampling"]),
        "adapter": draw["adapter"],
        "draw": json.dumps(kept),
    }


def keep(parts: Parts, attempt: int, begun: EngineStart, results: list[Row], *, final: bool) -> None:
    """Keep answers, and the failures that no further try could mend."""
    begun.note(results)
    rows: list[Row] = [{"attempts": attempt} | _response(result) for result in results]
    parts.append(row for row in rows if final or row["status"] != Status.FAILED or hopeless(row))


def hopeless(failed: Row) -> bool:
    """Whether a further try of a draw would fail as well; an endpoint's client has made its tries already."""
    return "endpoint" in failed["engine"] or any(words in failed["error"] for words in TOO_LONG)


def check_share(parts: Parts, share: float, title: str, may_be_silent: bool = False) -> None:
    """PsyrayError where too large a share of the draws has no usable answer; those are set aside, to be made anew."""
    good = {Status.OK, Status.INVALID} if may_be_silent else {Status.OK}
    bad = {row["response_id"]: row["error"] for row in parts.each(["response_id", "status", "error"])
           if row["status"] not in good}  # fmt: skip

    def mend() -> str:
        return (
            f"They are in {parts.set_aside(set(bad))}; mend the cause and run the same command again: the good ones "
            "are kept, the failed ones are tried anew"
        )

    ceiling = Ceiling(share, "responses.max_invalid_share")
    check_ceiling(title, "responses failed", Counter(bad.values()), len(parts.ids), ceiling, mend)


def _response(result: Row) -> Row:
    draw: Row = json.loads(result["draw"])
    error = result.get("__inference_error__") or ""
    answer = said(result.get("text") or "")
    text = (answer or "").strip()
    status = Status.FAILED if error else Status.OK if text else Status.INVALID
    return draw | {
        "text": text if status is Status.OK else None,
        "tokens": result.get("tokens"),
        "truncated": result.get("tokens") is not None and result["tokens"] >= draw["max_tokens"],
        "repeated": repetition(text),
        "status": status,
        "error": error or ("" if text else CUT_OFF if answer is None else "empty answer"),
        "raw_text": result.get("text"),
    }


SUMMED = ("status", "truncated", "repeated", "text")


def summary(responses: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and shares over response rows, of which only the columns `SUMMED` are read."""
    counts, words = Counter[str](), 0
    for row in responses:
        counts["all"] += 1
        if row["status"] == Status.OK:
            counts["ok"] += 1
            counts["truncated"] += row["truncated"]
            counts["repeated"] += row["repeated"] >= LOOP_SHARE
            words += len(row["text"].split())
    good = counts["ok"] or 1
    return {
        "ok": counts["ok"],
        "failed": counts["all"] - counts["ok"],
        "truncated_share": counts["truncated"] / good,
        "repeated_share": counts["repeated"] / good,
        "mean_words": words / good,
    }
