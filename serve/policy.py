"""The policy's side of a chat: how the engine runs it, and what a client's request gets that does not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psyray.cluster import QUIET
from psyray.engines.vllm import STEP_TOKENS, cpu_environment, lora
from psyray.sections.data import EngineSection
from serve.champion import Policy

STREAM_MS = 10  # between two packets of a stream; Ray's 50 would delay the first word by as much


def engine_settings(
    name: str, path: str, engine: EngineSection, adapters: Sequence[str] = (), *, gpu: bool
) -> dict[str, Any]:
    """The fields of ray.serve.llm's LLMConfig: on CPU with what vLLM needs there, on GPUs with its own defaults.

    `adapters` are the folders of the LoRA adapters that the model at `path` is to wear.
    """
    step = max(STEP_TOKENS[gpu], engine.max_model_len)
    kwargs: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "enable_prefix_caching": True,
        "disable_log_stats": True,  # figures that nobody would read, counted anew for every token
        "enforce_eager": not gpu,
        **({"tensor_parallel_size": engine.tensor_parallel} if engine.tensor_parallel > 1 else {}),
        # vLLM 0.29 on CPU dies of a seeded request whose prompt is read in chunks, and anyone may name a seed.
        **({} if gpu else {"enable_chunked_prefill": False, "max_num_batched_tokens": step}),
        "default_chat_template_kwargs": engine.template,  # as the policy was sampled and trained
        **lora(adapters, gpu),
        **engine.kwargs,
    }
    environment = QUIET if gpu else {**QUIET, **cpu_environment(engine.kv_cache_gib)}
    return {
        "model_loading_config": {"model_id": name, "model_source": path},
        "accelerator_config": {"kind": "gpu" if gpu else "cpu"},
        "engine_kwargs": kwargs,
        "runtime_env": {"env_vars": dict(environment)},
        # The engine's own bundle counts; one more CPU for the process around it would leave none on a small machine.
        "deployment_config": {"ray_actor_options": {"num_cpus": 0}},
        "experimental_configs": {"stream_batching_interval_ms": STREAM_MS},
        "log_engine_metrics": False,
    }


def with_defaults(tree: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
    """The chat request with the policy's system message and sampling where the client named none."""
    full: dict[str, Any] = {"temperature": policy.temperature, "top_p": policy.top_p, **tree}
    if policy.system and not any(message["role"] in ("system", "developer") for message in tree["messages"]):
        full["messages"] = [{"role": "system", "content": policy.system}, *tree["messages"]]
    if not {"max_tokens", "max_completion_tokens"} & set(tree):
        full["max_completion_tokens"] = policy.max_tokens
    if policy.stop:
        full.setdefault("stop", policy.stop)
    return full
