"""How likely language models find texts: plain forward passes in one Ray task, one model in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psyray.cluster import require, use_gpu
from psyray.config import Config
from psyray.engines.thinking import prompt_tokens
from psyray.errors import from_workers
from psyray.needs import forward
from psyray.records import Message
from psyray.reward.body import padded
from psyray.sections.data import EngineSection

TOKENS_AT_ONCE = 2048  # in one pass: the logits of more would be most of the memory


@dataclass(frozen=True)
class Passage:
    """Words after others: only `text` counts. `before` is plain text, or a conversation that the text answers."""

    key: str
    before: str | list[Message]
    text: str


Asked = Sequence[tuple[str, Sequence[Passage]]]  # (model, its passages)


@from_workers
def likelihoods(asked: Asked, config: Config, *, title: str) -> list[dict[str, list[float]]]:
    """For each model, by key: the natural log-probability of each token of the passage's text, at temperature 1.

    A passage longer than `engine.max_model_len` loses its beginning. The first token of a text that follows nothing
    has no probability and is left out. PsyrayError where the cluster has no place for the task.
    """
    import ray

    gpu = use_gpu(config.engine.device)
    require(forward(gpu), config.cluster.wait_s, title)
    # No environment of its own: so the task gets a process that Ray has ready.
    task = ray.remote(_each_model).options(**({"num_gpus": 1} if gpu else {"num_cpus": 1}))
    threads = os.cpu_count() or 1
    found = ray.get(task.remote(asked, config.engine, gpu, threads))
    return list(found)


def _each_model(asked: Asked, engine: EngineSection, gpu: bool, threads: int) -> list[dict[str, list[float]]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    found = list[dict[str, list[float]]]()
    for name, passages in asked:
        if not passages:
            found.append({})
            continue
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, engine.dtype)).eval()
        model.to("cuda" if gpu else "cpu")
        found.append(of_model(model, tokenizer, passages, engine))
        del model  # before the next is loaded
    return found


def of_model(model: Any, tokenizer: Any, passages: Sequence[Passage], engine: EngineSection) -> dict[str, list[float]]:
    """The log-probabilities under one loaded model, by key."""
    cut = {p.key: tokens(tokenizer, p, engine.max_model_len, engine.template) for p in passages}
    found: dict[str, list[float]] = {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for keys in batches({key: len(ids) for key, (ids, _) in cut.items()}):
        rows = _forward(model, [cut[key][0] for key in keys], pad)
        found |= {key: row[cut[key][1] - 1 :] for key, row in zip(keys, rows, strict=True)}
    return found


def batches(lengths: Mapping[str, int]) -> list[list[str]]:
    """The keys in batches of like length, each of at most `TOKENS_AT_ONCE` tokens with its padding."""
    found: list[list[str]] = []
    for key in sorted(lengths, key=lambda k: (lengths[k], k)):
        if not found or (len(found[-1]) + 1) * lengths[key] > TOKENS_AT_ONCE:
            found.append([])
        found[-1].append(key)
    return found


def tokens(tokenizer: Any, passage: Passage, max_length: int, template: Mapping[str, Any]) -> tuple[list[int], int]:
    """(ids, the place of the first token that counts)."""
    if isinstance(passage.before, str):
        head = tokenizer(passage.before)["input_ids"]
        ids = tokenizer(passage.before + passage.text)["input_ids"]
    else:
        head = prompt_tokens(tokenizer, passage.before, template)
        ids = [*head, *tokenizer(passage.text, add_special_tokens=False)["input_ids"]]
    # A tokeniser may join the end of one to the beginning of the other: what is not the same counts as the text.
    first = next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids)))
    over = max(0, len(ids) - max_length)
    return [int(i) for i in ids[over:]], max(1, first - over)


def _forward(model: Any, rows: Sequence[Sequence[int]], pad: int) -> list[list[float]]:
    """Log-probabilities of each row's tokens but the first."""
    import torch

    ids, mask = (filled.to(model.device) for filled in padded(rows, pad))
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    chances = (-losses).view(len(rows), -1).cpu().tolist()
    return [chances[i][: len(row) - 1] for i, row in enumerate(rows)]
