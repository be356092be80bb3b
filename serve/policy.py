"""The policy's side of a chat: how the engine runs it, and what a client's request gets that does not say."""

from __future__ import annotations

from typing import Any, TypeVar

from psyray.cluster import QUIET
from psyray.engines.vllm import cpu_environment
from psyray.sections.data import EngineSection
from serve.champion import Policy

Body = TypeVar("Body", bound=Any)  # vLLM's ChatCompletionRequest, whose import costs many seconds


def engine_settings(policy: Policy, engine: EngineSection, *, gpu: bool) -> dict[str, Any]:
    """The fields of ray.serve.llm's LLMConfig: on CPU with what vLLM needs there, on GPUs with its own defaults."""
    kwargs: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "enable_prefix_caching": True,
        "enforce_eager": not gpu,
        **({"tensor_parallel_size": engine.tensor_parallel} if engine.tensor_parallel > 1 else {}),
        **engine.kwargs,
    }
    environment = QUIET if gpu else {**QUIET, **cpu_environment(engine.kv_cache_gib)}
    return {
        "model_loading_config": {"model_id": policy.name, "model_source": policy.path},
        "accelerator_config": {"kind": "gpu" if gpu else "cpu"},
        "engine_kwargs": kwargs,
        "runtime_env": {"env_vars": dict(environment)},
        # The engine's own bundle counts; one more CPU for the process around it would leave none on a small machine.
        "deployment_config": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}},
        "log_engine_metrics": False,
    }


def with_defaults(body: Body, policy: Policy) -> Body:
    """The chat request with the policy's system message and sampling where the client named none."""
    given = body.model_fields_set
    if policy.system and not any(message.get("role") in ("system", "developer") for message in body.messages):
        body.messages = [{"role": "system", "content": policy.system}, *body.messages]
    if "temperature" not in given:
        body.temperature = policy.temperature
    if "top_p" not in given:
        body.top_p = policy.top_p
    if not given & {"max_tokens", "max_completion_tokens"}:
        body.max_completion_tokens = policy.max_tokens
    if "stop" not in given and policy.stop:
        body.stop = policy.stop
    return body
