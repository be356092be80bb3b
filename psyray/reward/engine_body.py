"""The reward model's body in a vLLM engine of this process: the features that its heads read, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psyray.engines.vllm import STEP_TOKENS, cpu_environment
from psyray.records import Message
from psyray.reward.body import chat_tokens

FloatArray = npt.NDArray[np.float64]
CACHE_GIB = 1  # of keys and values on CPU; a text's are dropped as soon as it is read
FORMAT = "psyray_body"
SCORED, BARE = "ForSequenceClassification", "ForCausalLM"


def environment(gpus: float) -> dict[str, str]:
    """What the process of an `EngineBody` needs, before it starts."""
    # One process: what is handed out are rows of floats, and a second process would only carry them.
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **({} if gpus else cpu_environment(CACHE_GIB))}


class EngineBody:
    """The default reading of `Body`, the last layer's state at the last token, by another way to compute it."""

    def __init__(self, model: Path | str, *, max_length: int, max_num_seqs: int = 64, gpus: float = 0.0) -> None:
        """`gpus`: the share of a GPU that is its own; 0 is CPU. The process has `environment(gpus)`."""
        from transformers import AutoConfig
        from vllm import LLM

        gpu = gpus > 0
        _register()
        names = AutoConfig.from_pretrained(str(model)).architectures
        self.engine = LLM(
            str(model),
            runner="pooling",
            convert="embed",
            hf_overrides={"architectures": [name.replace(SCORED, BARE) for name in names]},
            load_format=FORMAT,
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
        self.tokenizer = self.engine.get_tokenizer()
        self.tokenizer.truncation_side = "left"
        self.max_length = max_length

    def features(self, chats: Sequence[Sequence[Message]]) -> FloatArray:
        """[N, D] features; a chat longer than `max_length` tokens loses its beginning, never the response."""
        from vllm import PoolingParams

        prompts = [{"prompt_token_ids": chat_tokens(self.tokenizer, chat, self.max_length)} for chat in chats]
        read = self.engine.encode(prompts, PoolingParams(use_activation=False), pooling_task="embed", use_tqdm=False)
        return np.stack([row.outputs.data.float().numpy() for row in read]).astype(np.float64)


def _register() -> None:
    """Teach this process's vLLM to load a scored model without its score head."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    @register_model_loader(FORMAT)
    class BodyLoader(DefaultModelLoader):  # type: ignore[misc]
        def __init__(self, load_config: Any) -> None:
            super().__init__(replace(load_config, load_format="auto"))

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
            return (pair for pair in super().get_all_weights(model_config, model) if not pair[0].startswith("score."))
