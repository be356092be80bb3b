"""vLLM through `ray.data.llm`: rows with `messages` and `sampling` in, rows with text or an error out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from psyray.cluster import require, use_gpu
from psyray.engines.thinking import OPEN, opens, prompt_tokens
from psyray.errors import PsyrayError
from psyray.needs import engine as bundles
from psyray.needs import workers
from psyray.records import Row
from psyray.sections.data import EngineSection

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
ADAPTER = "adapter_config.json"
WHOLE = 1_000_000  # tokens between two reports on an answer
# Tokens in one step of the engine, on CPU and on a GPU, as vLLM itself takes them offline; an engine that Ray starts
# would take the 2,048 of a server.
STEP_TOKENS = {False: 4096, True: 8192}
BATCH = 32  # rows that travel through the pipeline, and come back, together


def cpu_environment(kv_cache_gib: int) -> dict[str, str]:
    """What vLLM needs to know where there is no GPU: cache size, and one thread per core for its single process."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def generate(dataset: Any, model: str, engine: EngineSection, wait_s: float, adapters: Sequence[str] = ()) -> Any:
    """Answer every row's `messages` under its `sampling`, and where it names an `adapter`, by the model that wears it.

    Output rows hold the input's `key` (and `draw`, where it has one), `text`, `tokens`, `seconds` in the engine,
    `logprobs`; a failed row holds `key`, `draw` and `__inference_error__` and does not disturb its neighbours.
    """
    from ray.data import TaskPoolStrategy
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    gpu = use_gpu(engine.device)
    require(bundles(engine, gpu), wait_s, f"the engine for {model}")
    placement = {} if gpu else {"placement_group_config": {"bundle_per_worker": {"CPU": 1}}}
    environment = {} if gpu else {"runtime_env": {"env_vars": cpu_environment(engine.kv_cache_gib)}}
    kwargs: Row = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "enforce_eager": not gpu,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": max(STEP_TOKENS[gpu], engine.max_model_len),
        # Only whole answers are wanted, so Python need not hear of every token.
        "stream_interval": WHOLE,
        "disable_log_stats": True,
        **({"tensor_parallel_size": engine.tensor_parallel} if engine.tensor_parallel > 1 else {}),
        # Ray Data's own choice, workers that are Ray's, reserves GPUs for one replica more than there are, and none of
        # them is given back before the run ends.
        **({"distributed_executor_backend": "mp"} if workers(engine) > 1 else {}),
        **lora(adapters, gpu),
        **engine.kwargs,
    }
    config = vLLMEngineProcessorConfig(
        model_source=model,
        batch_size=BATCH,
        max_concurrent_batches=max(8, 2 * engine.max_num_seqs // BATCH),
        concurrency=(engine.replicas, engine.replicas),
        should_continue_on_error=True,
        log_engine_metrics=False,
        engine_kwargs=kwargs,
        # Three actors that each import the whole engine, for what one cached tokenizer does in `_to_request`.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        **placement,
        **environment,
    )
    _report_nothing()
    # A whole CPU for a light stage starves a small machine of the engine; so do many tokenisers that start at once.
    light = {"num_cpus": 0.05, "compute": TaskPoolStrategy(size=engine.replicas)}
    processor = build_processor(
        config,
        preprocess=partial(_to_request, model, engine.template, gpu or kwargs.get("enable_chunked_prefill") is False),
        postprocess=_to_result,
        preprocess_map_kwargs=light,
        postprocess_map_kwargs=light,
    )
    return processor(dataset)


def lora(adapters: Sequence[str], gpu: bool) -> Row:
    """vLLM's settings for LoRA adapters; PsyrayError for a folder that holds none."""
    ranks = [adapter_rank(Path(adapter)) for adapter in adapters]
    if not ranks:
        return {}
    # vLLM takes these ranks only.
    room = next((size for size in LORA_RANKS if size >= max(ranks)), None)
    if room is None:
        raise PsyrayError(f"a LoRA adapter of rank {max(ranks)} is more than vLLM takes ({LORA_RANKS[-1]})")
    # vLLM 0.29 on CPU gives a row without an adapter the one of the last slot where a batch mixes both
    # (vllm pull request 48421): there the last slot stays empty.
    slots = len(ranks) if gpu else len(ranks) + 1
    return {"enable_lora": True, "max_loras": slots, "max_lora_rank": room}


def adapter_rank(folder: Path) -> int:
    """The rank of the LoRA adapter in a folder; PsyrayError if there is none."""
    return int(_adapter(folder)["r"])


def adapter_base(folder: Path | str) -> str:
    """The model that the LoRA adapter in a folder was trained on; PsyrayError if there is none."""
    return str(_adapter(Path(folder))["base_model_name_or_path"])


def is_adapter(folder: Path | str) -> bool:
    """Whether the folder holds a LoRA adapter rather than a model."""
    return (Path(folder) / ADAPTER).is_file()


def _adapter(folder: Path) -> Row:
    if not is_adapter(folder):
        raise PsyrayError(f"no LoRA adapter in {folder}: {ADAPTER} is missing")
    described: Row = json.loads((folder / ADAPTER).read_text())
    return described


def _report_nothing() -> None:
    """Ray describes every processor to a usage actor, which takes ten seconds to start; no one is to be told anyway."""
    from ray.llm._internal.batch.processor import vllm_engine_proc

    class Silent:
        def push_telemetry_report(self, telemetry: object) -> None:
            """Nothing."""

    vllm_engine_proc.get_or_create_telemetry_agent = Silent


@cache
def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _to_request(model: str, template: Mapping[str, Any], seeded: bool, row: Row) -> Row:
    chat = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    tokens = prompt_tokens(_tokenizer(model), chat, template)
    # Sampling travels as JSON: Arrow would give every row the union of all rows' keys.
    sampling = json.loads(row["sampling"])
    if not seeded:
        # vLLM 0.29 on CPU dies of a seeded request whose prompt is prefilled in chunks: its generator has no offset.
        # With `engine.kwargs: {enable_chunked_prefill: false}` there are no chunks, and seeds are kept.
        sampling.pop("seed", None)
    # A row's model that is not the engine's is one of its adapters; each row names one: Arrow fills gaps with null.
    carried: Row = {"model": row.get("adapter") or model} | ({"draw": row["draw"]} if "draw" in row else {})
    carried["thinks"] = opens(_tokenizer(model), tokens)
    return {"key": row["key"], **carried, "tokenized_prompt": tokens, "sampling_params": sampling}


def _to_result(row: Row) -> Row:
    return {
        "key": row["key"],
        **({"draw": row["draw"]} if "draw" in row else {}),
        "text": OPEN + row["generated_text"] if row["thinks"] else row["generated_text"],
        "tokens": row["num_generated_tokens"],
        "seconds": row["time_taken_llm"],
        "logprobs": json.dumps(row["logprobs"]) if row.get("logprobs") is not None else "",
        "__inference_error__": "",
    }
