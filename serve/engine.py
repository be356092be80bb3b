"""The policy's engine as a deployment: plain data in, JSON out, so that the port need not know vLLM's classes.

Importing this imports vLLM, which takes many seconds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from pydantic import ValidationError
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse  # the public one is a subclass
from ray.llm._internal.serve.core.server.llm_server import LLMServer
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from serve.chat import Refusal


class Engine(VLLMEngine):  # type: ignore[misc]
    """Ray's vLLM engine, which on one CPU device computes in its own process as vLLM's server does."""

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        if config.device_config.device_type == "cpu" and config.parallel_config.world_size == 1:
            # Ray asks for a worker process beside it: a millisecond more for every token, and a gigabyte.
            arguments.distributed_executor_backend = config.parallel_config.distributed_executor_backend = "uni"
        return arguments, frontend, config


class PolicyServer(LLMServer):  # type: ignore[misc]
    """Ray's vLLM server with one more method."""

    _default_engine_cls = Engine

    async def _start_engine(self) -> None:
        await self.engine.start()  # without the process that would gather what Ray reports home

    async def answer(self, tree: dict[str, Any], name: str) -> AsyncIterator[str | Refusal]:
        """The answer to a chat request as JSON, or with `stream` its server-sent events; it is given as `name`'s."""
        try:
            body = ChatCompletionRequest.model_validate(tree)
        except (ValidationError, VLLMValidationError, ValueError):  # their words may repeat the client's
            yield Refusal(422, "not as the engine can take it")
            return
        # Inside a text of the answer the quotes would be escaped.
        theirs, ours = f'"model":"{tree["model"]}"', f'"model":"{name}"'
        async for piece in await self.chat(body):
            for part in piece if isinstance(piece, list) else [piece]:  # several events of a stream come together
                if isinstance(part, ErrorResponse):
                    yield Refusal(part.error.code, part.error.message)
                    return
            if isinstance(piece, list):
                yield "".join(piece).replace(theirs, ours)
            else:
                piece.model = name
                yield piece.model_dump_json()
