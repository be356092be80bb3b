"""The reward model's body in a vLLM engine: the features that its heads read, of many requests at once, unpadded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np

from psyray.arrays import FloatArray
from psyray.engines.vllm import STEP_TOKENS, cpu_environment
from psyray.records import Message
from psyray.reward.body import chat_tokens

CACHE_GIB = 1  # of keys and values on CPU; a text's are dropped as soon as it is read
SCORED, BARE = "ForSequenceClassification", "ForCausalLM"


def environment(gpus: float) -> dict[str, str]:
    """What the process of an `EngineBody` needs, before it starts."""
    return {} if gpus else cpu_environment(CACHE_GIB)


def engine_runs(gpus: float) -> bool:
    """Whether the vLLM that is installed can compute with this share of a GPU: one built for GPUs needs some."""
    from vllm.platforms import current_platform

    return gpus > 0 or current_platform.is_cpu()


class EngineBody:
    """The default reading of `Body`, the last layer's state at the last token, by another way to compute it.

    The engine is a process of its own: what computes must not keep the requests waiting that it could take along.
    """

    def __init__(self, model: Path | str, *, max_length: int, max_num_seqs: int = 64, gpus: float = 0.0) -> None:
        """`gpus`: the share of a GPU that is its own; 0 is CPU. The process has `environment(gpus)`."""
        from transformers import AutoConfig, AutoTokenizer
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from psyray.reward.body_loader import EXTENSION, FORMAT

        gpu = gpus > 0
        names = AutoConfig.from_pretrained(str(model)).architectures
        arguments = AsyncEngineArgs(
            str(model),
            runner="pooling",
            convert="embed",
            hf_overrides={"architectures": [name.replace(SCORED, BARE) for name in names]},
            load_format=FORMAT,
            worker_extension_cls=EXTENSION,
            dtype="bfloat16",
            max_model_len=max_length,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(STEP_TOKENS[gpu], max_length),
            enforce_eager=not gpu,
            # A cached beginning would tell by its time what another key has asked.
            enable_prefix_caching=False,
            disable_log_stats=True,
            **({"gpu_memory_utilization": 0.9 * min(gpus, 1.0)} if gpu else {}),
        )
        self.engine = AsyncLLM.from_engine_args(arguments)
        self.tokenizer = AutoTokenizer.from_pretrained(str(model), truncation_side="left")
        self.max_length = max_length

    async def features(self, chats: Sequence[Sequence[Message]]) -> FloatArray:
        """[N, D] features; a chat longer than `max_length` tokens loses its beginning, never the response."""
        return np.stack(await asyncio.gather(*map(self._read, chats)))

    async def check_health(self) -> None:
        """EngineDeadError where the engine's process has ended."""
        await self.engine.check_health()

    async def _read(self, chat: Sequence[Message]) -> FloatArray:
        from vllm import PoolingParams

        prompt = {"prompt_token_ids": chat_tokens(self.tokenizer, chat, self.max_length)}
        asked = PoolingParams(task="embed", use_activation=False)
        [read] = [out async for out in self.engine.encode(prompt, asked, uuid4().hex)]
        return np.asarray(read.outputs.data.float().numpy(), dtype=np.float64)
