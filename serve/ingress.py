"""The HTTP side of a served run: routes, refusals, and the handles to those who answer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any, Protocol
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve.access import Gate, Key, Limits, path_of
from serve.best import BestRequest, answer
from serve.chat import ChatRequest, Refusal
from serve.direct import Address, answering, listen
from serve.door import look
from serve.ear import NO, YES, Ask, Ear
from serve.guard import Replies, client_texts, crisis_hits, safe_reply
from serve.health import Health
from serve.keeper import ASK_S, OWED_S, Keeper
from serve.lineup import CHAMPION_NAME, Lineup, Order, Scoring, Served
from serve.policy import with_defaults
from serve.refusals import bound, differing, invalid, openai_error
from serve.reward import ScoreReply, ScoreRequest
from serve.transcript import Transcript, said

HEALTH_TIMEOUT_S = 5.0
ID, CRISIS, FLAGGED_BY = "X-Psyray-Id", "X-Psyray-Crisis", "X-Psyray-Crisis-By"
MAX_ONGOING = 1000  # Serve's default of 5 would keep requests waiting before the port counts them


def application(
    order: Order, keys: tuple[Key, ...], limits: Limits, replies: Replies | None, ask: Ask | None = None
) -> serve.Application:
    """The port behind its gate, and the keeper of those who answer."""
    # Neither computes: they wait on the network.
    options = {"num_replicas": 1, "max_ongoing_requests": MAX_ONGOING, "ray_actor_options": {"num_cpus": 0}}
    keeper = serve.deployment(Keeper, name="Keeper", graceful_shutdown_timeout_s=2 * OWED_S, **options).bind(order)
    port = serve.deployment(serve.ingress()(Ingress), name="Ingress", **options)
    asked = order.asked
    return port.bind(keeper, keys, limits, replies, asked.timeout_s, asked.direct, asked.log_text, ask)


class Pieces(Protocol):
    """An engine's answer as it comes, as Serve's handle gives it."""

    def __anext__(self) -> Awaitable[str | Refusal]: ...

    def __aiter__(self) -> Pieces: ...

    def cancel(self) -> None: ...


class Ingress:
    """The routes: chat goes to an engine, scores to the reward model, whoever they are at that moment."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        keeper: DeploymentHandle,
        keys: tuple[Key, ...],
        limits: Limits,
        replies: Replies | None,
        timeout_s: float,
        address: Address | None = None,
        log_text: Path | None = None,
        ask: Ask | None = None,
    ) -> None:
        look()
        self.keeper, self.keys, self.limits = keeper, keys, limits
        self.replies, self.timeout_s = replies, timeout_s
        self.address = address
        self.transcript = self._transcript(log_text) if log_text else None
        about = "chat requests whose words speak of a crisis, by kind and by who says so"
        self.crises = Counter("psyray_crisis_requests", description=about, tag_keys=("kind", "guard", "by"))
        self.ear = Ear(ask) if ask else None
        about = "chat requests that a model was asked about, by its answer or why there was none"
        self.heard = Counter("psyray_crisis_asked", description=about, tag_keys=("answer",))
        # A model that cannot be asked is told of by the log and by `healthz` before a client comes.
        self._trying = asyncio.create_task(self.ear.hear(["Hello."])) if self.ear else None
        self.health = Health(self._check, beside=self._beside)
        self._handles: dict[tuple[str, bool], DeploymentHandle] = {}
        self.lineup: Lineup = await keeper.lineup.remote()
        self._following = asyncio.create_task(self._follow())

    def __serve_build_asgi_app__(self) -> FastAPI:
        port = listen(self.address) if self.address else None
        return http_app(self, self.keys, self.limits, port)

    def _transcript(self, folder: Path) -> Transcript:
        replica = serve.get_replica_context()
        transcript = Transcript(folder, f"{replica.app_name}-{replica.replica_id.unique_id}")
        logging.getLogger("ray.serve").warning("what clients say and are answered is kept in %s", transcript.file)
        return transcript

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(ASK_S)
            try:
                lineup = await self.keeper.lineup.remote()
            except (RayError, RayServeException):  # a keeper that died comes back; meanwhile nothing changes
                continue
            if lineup != self.lineup:
                self.lineup, self._handles = lineup, {}

    def _handle(self, app: str, *, stream: bool = False) -> DeploymentHandle:
        """The handle to a part; made once, since each has its own line to Serve's controller."""
        if (app, stream) not in self._handles:
            self._handles[app, stream] = serve.get_app_handle(app).options(stream=stream)
        return self._handles[app, stream]

    def _called(self, name: str | None) -> Served:
        if (served := self.lineup.called(name)) is None:
            names = [CHAMPION_NAME, *(served.name for served in self.lineup.models)]
            raise HTTPException(404, f"no model of that name; there are {', '.join(names)}")
        return served

    async def models(self) -> dict[str, Any]:
        """Who may be asked."""
        cards = [card(served, served.name) for served in self.lineup.models]
        return {"object": "list", "data": [card(self.lineup.models[0], CHAMPION_NAME), *cards]}

    async def model_data(self, model: str) -> dict[str, Any]:
        """One of them."""
        return card(self._called(model), model)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """A chat completion by the policy."""
        return self._kept(body, request, await self._chat(body, request))

    async def _chat(self, body: ChatRequest, request: Request) -> Response:
        bound(len(body.messages), self.limits.messages, "messages", "messages")
        served, tree = self._called(body.model), body.tree()
        hits = crisis_hits(tree["messages"])
        by = "phrases" if hits else await self._second(tree["messages"])
        response: Response
        if by and self.replies:
            spoken = dict.fromkeys(hit.language for hit in hits)
            text = self.replies.for_client(request.headers.get("Accept-Language", ""), spoken)
            response = safe_reply(text, served.name, stream=bool(tree.get("stream")))
        else:
            tokens = body.tokens(served.policy.max_tokens)
            bound(tokens, self.limits.tokens, "new tokens over all answers", "max_tokens")
            tree = with_defaults(tree, served.policy)
            differing(body.answers, tree["temperature"])
            request.scope["psyray.more"](body.answers - 1)  # each answer is a request's work
            tree |= {"model": served.called, "request_id": uuid4().hex}  # an id of the client's may be another's too
            if key := request.scope.get("psyray.key"):
                tree["cache_salt"] = key  # or the time of an answer told what another key has asked
            response = await self._in_time(self._ask(served, tree))
        response.headers[ID] = served.export
        if by:
            response.headers[CRISIS], response.headers[FLAGGED_BY] = "true", by
            for kind in dict.fromkeys(hit.kind for hit in hits) or ("not told",):
                self.crises.inc(tags={"kind": kind, "guard": "reply" if self.replies else "mark", "by": by})
        return response

    async def _second(self, messages: list[dict[str, Any]]) -> str:
        """Who flags words that no phrase does: the `model`, the lack of its answer (`unanswered`), or nobody."""
        if self.ear is None:
            return ""
        answer = await self.ear.hear(client_texts(messages))
        self.heard.inc(tags={"answer": answer})
        return {YES: "model", NO: ""}.get(answer, "unanswered" if self.ear.ask.failed == "flag" else "")

    async def _ask(self, served: Served, tree: dict[str, Any]) -> Response:
        """The engine's answer, whole or as its stream."""
        # The engine gets the request alone: headers hold the key, and some that vLLM knows would steer it.
        pieces: Pieces = self._handle(served.app, stream=True).answer.remote(tree, served.name)
        try:
            first = await anext(pieces)
        except asyncio.CancelledError:  # it took too long, or its client went away
            pieces.cancel()
            raise
        if not isinstance(first, str):
            raise HTTPException(first.status, first.words)
        if tree.get("stream"):
            return StreamingResponse(events(first, pieces, self.timeout_s), media_type="text/event-stream")
        return Response(first, media_type="application/json")

    async def best(self, body: BestRequest, request: Request) -> Response:
        """The answer of several that the reward model likes best (serve/best.py)."""
        self._scoring()  # without one there is nothing to pick by: told before anything is generated
        try:
            conversation = body.conversation()
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        response = await self._chat(body, request)
        if self.replies and CRISIS in response.headers:
            return self._kept(body, request, response)
        completion = json.loads(bytes(response.body))
        completion["choices"] = [c for c in completion["choices"] if (c["message"]["content"] or "").strip()]
        if not completion["choices"]:
            raise HTTPException(503, f"the policy gave {body.of} empty answers", headers={"Retry-After": "1"})
        texts = [choice["message"]["content"] for choice in completion["choices"]]
        items = [conversation.model_copy(update={"response": text}) for text in texts]
        scoring = self._scoring()  # whoever it is by now: the one before may have gone with its champion
        scores = [(s.score, s.spread) for s in await self._in_time(self._handle(scoring.app).score.remote(items))]
        kept = {name: response.headers[name] for name in (ID, CRISIS, FLAGGED_BY) if name in response.headers}
        best = JSONResponse(answer(completion, scores, body.caution, scoring.name), headers=kept)
        return self._kept(body, request, best)

    def _kept(self, body: ChatRequest, request: Request, response: Response) -> Response:
        """The response, written down where that was asked for; a stream when it ends."""
        if self.transcript is None:
            return response
        flags = {"flagged": CRISIS in response.headers, "flagged_by": response.headers.get(FLAGGED_BY, "")}
        row = {**asker(request), "messages": body.tree()["messages"], **flags}
        if isinstance(response, StreamingResponse):
            response.body_iterator = self.transcript.keep_stream(response.body_iterator, row)
        else:
            self.transcript.keep({**row, **said(json.loads(bytes(response.body)))})
        return response

    async def score_answers(self, body: ScoreRequest, request: Request, response: Response) -> ScoreReply:
        """Scores of answers by the reward model."""
        for place, item in enumerate(body.items):
            bound(len(item.messages), self.limits.messages, "messages", "items", place, "messages")
        scoring = self._scoring()
        response.headers[ID] = scoring.export
        scores = await self._in_time(self._handle(scoring.app).score.remote(body.items))
        reply = ScoreReply(model=scoring.name, scores=scores)
        if self.transcript:
            self.transcript.keep({**asker(request), "id": uuid4().hex, **body.model_dump(), **reply.model_dump()})
        return reply

    def _scoring(self) -> Scoring:
        if self.lineup.reward is None:
            raise HTTPException(404, "this server was started with reward=false")
        return self.lineup.reward

    async def _in_time(self, answer: Awaitable[Any]) -> Any:
        """The answer; 503 where it takes too long or its replica died, which passes."""
        try:
            return await asyncio.wait_for(answer, self.timeout_s)
        except TimeoutError:
            raise HTTPException(503, "no answer in time", headers={"Retry-After": "10"}) from None
        except (RayError, RayServeException) as error:
            raise HTTPException(503, "the answer was lost; ask again", headers={"Retry-After": "1"}) from error

    async def healthz(self) -> JSONResponse:
        """Whether the engine behind the port answers."""
        return await self.health.reply()

    def _beside(self) -> dict[str, str]:
        return {"ear": "ok" if self.ear.well else "unavailable"} if self.ear else {}

    async def _check(self) -> None:
        health = self._handle(self.lineup.models[0].app).check_health.remote()
        await asyncio.wait_for(health, HEALTH_TIMEOUT_S)


def card(served: Served, name: str) -> dict[str, Any]:
    """A policy as OpenAI's clients list models."""
    about = {"name": served.name, "round": served.policy.round, "export": served.export}
    return {"id": name, "object": "model", "created": 0, "owned_by": "psyray", "metadata": about}


def asker(request: Request) -> dict[str, str]:
    """Who asked, and what for, as a transcript's line begins."""
    return {"key": request.scope.get("psyray.key", ""), "route": path_of(request.scope)}


async def events(first: str, rest: Pieces, timeout_s: float) -> AsyncIterator[str]:
    """The engine's server-sent events as they come; a stream that breaks off, or stalls, ends without its [DONE].

    The engine's work ends with it.
    """
    yield first
    try:
        while isinstance(piece := await asyncio.wait_for(anext(rest, None), timeout_s), str):
            yield piece
    except TimeoutError:
        logging.getLogger("ray.serve").warning("a stream stood still for %g s and was ended", timeout_s)
    finally:
        rest.cancel()


def http_app(routes: Ingress, keys: tuple[Key, ...], limits: Limits, port: socket | None = None) -> FastAPI:
    """A bare application without CORS: no web page of another origin may read what clients say here.

    Where there is a `port` of its own, it answers there as long as it lives.
    """
    lifespan = partial(answering, port=port, grace_s=routes.timeout_s) if port else None
    app = FastAPI(title="psyray", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.get("/v1/models")(routes.models)
    app.get("/v1/models/{model:path}")(routes.model_data)
    app.post("/v1/chat/completions")(routes.chat)
    app.post("/v1/chat/best")(routes.best)
    app.post("/reward/score")(routes.score_answers)
    app.get("/healthz")(routes.healthz)
    app.add_middleware(Gate, keys=keys, limits=limits)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, _fail)
    return app


def description() -> dict[str, Any]:
    """The port's OpenAPI description."""
    return http_app(object.__new__(Ingress), (), Limits()).openapi()


async def _fail(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if request.url.path.startswith("/v1/"):
        return openai_error(error.status_code, error.detail, "invalid_request_error", error.headers)
    return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)
