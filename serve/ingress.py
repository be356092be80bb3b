"""The HTTP side of a served run: routes, refusals, and the deployments behind them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException, to_model_metadata
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from ray.util.metrics import Counter
from starlette.responses import JSONResponse, Response
from vllm.exceptions import VLLMValidationError

from psyray.cluster import use_gpu
from psyray.sections.data import EngineSection
from serve.access import Gate, Key, Limits, openai_error
from serve.best import BestRequest, Chat, answer
from serve.champion import Args, Champion, Policy, Reward
from serve.guard import Replies, crisis_kinds, read_replies, safe_reply
from serve.policy import engine_settings, with_defaults
from serve.reward import RewardServer, ScoreReply, ScoreRequest

HEALTH_TIMEOUT_S = 5.0
ID, CRISIS = "X-Psyray-Id", "X-Psyray-Crisis"
MAX_ONGOING = 1000  # Serve's default of 5 would keep requests from being batched


def application(
    asked: Args, champion: Champion, engine: EngineSection, keys: tuple[Key, ...], limits: Limits
) -> serve.Application:
    """The ingress behind its gate, bound to the engine and, if asked for, to the reward model."""
    device = engine.device if asked.device == "auto" else asked.device
    config = LLMConfig(**engine_settings(champion.policy, engine, gpu=use_gpu(device)))
    ingress = make_fastapi_ingress(Ingress, endpoint_map=ROUTES, app=http_app(keys, limits))
    # The ingress only waits on the network and scoring is light: with the engine's one, two logical CPUs hold all.
    options = {"num_replicas": 1, "max_ongoing_requests": MAX_ONGOING}
    return serve.deployment(ingress, name="Ingress", ray_actor_options={"num_cpus": 0}, **options).bind(
        llm_deployments={config.model_id: build_llm_deployment(config)},
        model_cards={config.model_id: to_model_metadata(config.model_id, config)},
        policy=champion.policy,
        reward=_reward(champion.reward, asked.reward_gpus, options) if asked.reward else None,
        reward_name=champion.reward.name,
        export=champion.id,
        timeout_s=asked.timeout_s,
        replies=read_replies(asked.replies) if asked.guard == "reply" else None,
    )


def _reward(reward: Reward, gpus: float, options: Mapping[str, Any]) -> serve.Application:
    resources = {"num_cpus": 0.5, "num_gpus": gpus}
    deployment = serve.deployment(RewardServer, name="RewardServer", ray_actor_options=resources, **options)
    return deployment.bind(reward.path, reward.heads, reward.max_length, gpu=gpus > 0)


class Ingress(OpenAiIngress):  # type: ignore[misc]
    """The routes: chat goes to the engine, scores to the reward model."""

    def __init__(
        self,
        llm_deployments: dict[str, DeploymentHandle],
        model_cards: dict[str, Any],
        policy: Policy,
        reward: DeploymentHandle | None,
        reward_name: str,
        export: str,
        timeout_s: float,
        replies: Replies | None,
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        self.policy, self.reward, self.reward_name = policy, reward, reward_name
        self.export, self.timeout_s, self.replies = export, timeout_s, replies
        about = "chat requests whose words speak of a crisis, by kind"
        self.crises = Counter("psyray_crisis_requests", description=about, tag_keys=("kind", "guard"))
        self.engine = llm_deployments[policy.name]

    async def chat(self, body: Chat, request: Request) -> Response:
        """A chat completion by the policy; 400 where nobody speaks to it."""
        return await self._chat(readable(body.model_dump(exclude_unset=True)), request)

    async def _chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        if not any(message.get("role") == "user" for message in body.messages):
            raise HTTPException(400, "messages: none has the role 'user'")
        for message in body.messages:
            if not isinstance(message.get("content"), str | None):
                message["content"] = list(message["content"])  # pydantic leaves a one-way iterator of the parts
        kinds = crisis_kinds(body.messages)
        response: Response
        if kinds and self.replies:
            text = self.replies.for_language(request.headers.get("Accept-Language", ""))
            response = safe_reply(text, self.policy.name, stream=bool(body.stream))
        else:
            response = await self._in_time(super().chat(with_defaults(body, self.policy), request))
        response.headers[ID] = self.export
        if kinds:
            response.headers[CRISIS] = "true"
            for kind in kinds:
                self.crises.inc(tags={"kind": kind, "guard": "reply" if self.replies else "mark"})
        return response

    async def best(self, body: BestRequest, request: Request) -> Response:
        """The answer of several that the reward model likes best (serve/best.py)."""
        if self.reward is None:
            raise HTTPException(404, "this server was started with reward=false")
        asked = readable(body.chat())
        try:
            conversation = body.conversation()
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        response = await self._chat(asked, request)
        if response.status_code != 200 or (self.replies and CRISIS in response.headers):
            return response
        completion = json.loads(bytes(response.body))
        completion["choices"] = [c for c in completion["choices"] if (c["message"]["content"] or "").strip()]
        if not completion["choices"]:
            raise HTTPException(503, f"the policy gave {body.of} empty answers", headers={"Retry-After": "1"})
        texts = [choice["message"]["content"] for choice in completion["choices"]]
        items = [conversation.model_copy(update={"response": text}) for text in texts]
        scores = [(s.score, s.spread) for s in await self._in_time(self.reward.score.remote(items))]
        kept = {name: response.headers[name] for name in (ID, CRISIS) if name in response.headers}
        return JSONResponse(answer(completion, scores, body.caution, self.reward_name), headers=kept)

    async def score_answers(self, body: ScoreRequest, response: Response) -> ScoreReply:
        """Scores of answers by the reward model."""
        if self.reward is None:
            raise HTTPException(404, "this server was started with reward=false")
        response.headers[ID] = self.export
        scores = await self._in_time(self.reward.score.remote(body.items))
        return ScoreReply(model=self.reward_name, scores=scores)

    async def _in_time(self, answer: Awaitable[Any]) -> Any:
        """The answer; 503 where it takes too long, which on a busy server passes."""
        try:
            return await asyncio.wait_for(answer, self.timeout_s)
        except TimeoutError:
            raise HTTPException(503, "no answer in time", headers={"Retry-After": "10"}) from None

    async def healthz(self) -> JSONResponse:
        """Whether the engine behind the port answers."""
        names = {"policy": self.policy.name, "reward": self.reward_name if self.reward else None}
        try:
            await asyncio.wait_for(self.engine.check_health.remote(), HEALTH_TIMEOUT_S)
        except Exception as error:  # whatever ails the engine, the answer to this question is "not well"
            return JSONResponse({"status": "unavailable", "error": type(error).__name__, **names}, 503)
        return JSONResponse({"status": "ok", **names})


def readable(tree: dict[str, Any]) -> ChatCompletionRequest:
    """The request as the engine reads it; 422 where it cannot."""
    try:
        return ChatCompletionRequest.model_validate(tree)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    except VLLMValidationError as error:  # its own words may repeat the client's
        raise HTTPException(422, f"{error.parameter or 'the request'}: not as the engine can take it") from error
    except (TypeError, AttributeError, LookupError) as error:  # vLLM's validators expect the shape that they check for
        raise HTTPException(422, "the request cannot be read") from error


ROUTES = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "best": lambda app: app.post("/v1/chat/best"),
    "score_answers": lambda app: app.post("/reward/score"),
    "healthz": lambda app: app.get("/healthz"),
}


def http_app(keys: tuple[Key, ...], limits: Limits) -> FastAPI:
    """A bare application without CORS: no web page of another origin may read what clients say here."""
    app = FastAPI(title="psyray", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, keys=keys, limits=limits)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _fail)
    app.add_exception_handler(OpenAIHTTPException, _fail)
    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """422 that says where and what is wrong, without repeating the client's words."""
    assert isinstance(error, RequestValidationError)
    detail = [{"loc": list(e["loc"]), "msg": e["msg"].removeprefix("Value error, ")} for e in error.errors()]
    if request.url.path.startswith("/v1/"):
        first = detail[0]
        message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        return openai_error(422, message, "invalid_request_error")
    return JSONResponse({"detail": detail}, 422)


async def _fail(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException | OpenAIHTTPException)
    message = error.detail if isinstance(error, HTTPException) else error.message
    headers = getattr(error, "headers", None)
    if request.url.path.startswith("/v1/"):
        kind = getattr(error, "type", "invalid_request_error")
        return openai_error(error.status_code, message, kind, headers)
    return JSONResponse({"detail": message}, error.status_code, headers=headers)
