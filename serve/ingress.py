"""The HTTP side of a served run: routes, refusals, and the deployments behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException, to_model_metadata
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from starlette.responses import JSONResponse, Response

from psyray.cluster import use_gpu
from psyray.config import EngineSection
from serve.champion import Args, Champion, Policy, Reward
from serve.policy import engine_settings, speaks_of_crisis, with_defaults
from serve.reward import RewardServer, ScoreReply, ScoreRequest

HEALTH_TIMEOUT_S = 5.0
ID = "X-Psyray-Id"
MAX_ONGOING = 1000  # Serve's default of 5 would keep requests from being batched


def application(asked: Args, champion: Champion, engine: EngineSection) -> serve.Application:
    """The ingress bound to the engine and, if asked for, to the reward model."""
    device = engine.device if asked.device == "auto" else asked.device
    config = LLMConfig(**engine_settings(champion.policy, engine, gpu=use_gpu(device)))
    ingress = make_fastapi_ingress(Ingress, endpoint_map=ROUTES, app=http_app())
    # The ingress only waits on the network and scoring is light: with the engine's one, two logical CPUs hold all.
    options = {"num_replicas": 1, "max_ongoing_requests": MAX_ONGOING}
    return serve.deployment(ingress, name="Ingress", ray_actor_options={"num_cpus": 0}, **options).bind(
        llm_deployments={config.model_id: build_llm_deployment(config)},
        model_cards={config.model_id: to_model_metadata(config.model_id, config)},
        policy=champion.policy,
        reward=_reward(champion.reward, asked.reward_gpus, options) if asked.reward else None,
        reward_name=champion.reward.name,
        export=champion.id,
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
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        self.policy, self.reward, self.reward_name, self.export = policy, reward, reward_name, export
        self.engine = llm_deployments[policy.name]

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """A chat completion by the policy; 400 where nobody speaks to it."""
        if not any(message.get("role") == "user" for message in body.messages):
            raise HTTPException(400, "messages: none has the role 'user'")
        for message in body.messages:
            if not isinstance(message.get("content"), str | None):
                message["content"] = list(message["content"])  # pydantic leaves a one-way iterator of the parts
        in_crisis = speaks_of_crisis(body.messages)
        response: Response = await super().chat(with_defaults(body, self.policy), request)
        response.headers[ID] = self.export
        if in_crisis:
            response.headers["X-Psyray-Crisis"] = "true"
        return response

    async def score_answers(self, body: ScoreRequest, response: Response) -> ScoreReply:
        """Scores of answers by the reward model."""
        if self.reward is None:
            raise HTTPException(404, "this server was started with reward=false")
        response.headers[ID] = self.export
        return ScoreReply(model=self.reward_name, scores=await self.reward.score.remote(body.items))

    async def healthz(self) -> JSONResponse:
        """Whether the engine behind the port answers."""
        names = {"policy": self.policy.name, "reward": self.reward_name if self.reward else None}
        try:
            await asyncio.wait_for(self.engine.check_health.remote(), HEALTH_TIMEOUT_S)
        except Exception as error:  # whatever ails the engine, the answer to this question is "not well"
            return JSONResponse({"status": "unavailable", "error": type(error).__name__, **names}, 503)
        return JSONResponse({"status": "ok", **names})


ROUTES = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "score_answers": lambda app: app.post("/reward/score"),
    "healthz": lambda app: app.get("/healthz"),
}


def http_app() -> FastAPI:
    """A bare application without CORS: no web page of another origin may read what clients say here."""
    app = FastAPI(title="psyray", docs_url=None, redoc_url=None)
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
        return _openai_error(422, message, "invalid_request_error")
    return JSONResponse({"detail": detail}, 422)


async def _fail(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException | OpenAIHTTPException)
    message = error.detail if isinstance(error, HTTPException) else error.message
    if request.url.path.startswith("/v1/"):
        return _openai_error(error.status_code, message, getattr(error, "type", "invalid_request_error"))
    return JSONResponse({"detail": message}, error.status_code)


def _openai_error(code: int, message: str, kind: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, code)
