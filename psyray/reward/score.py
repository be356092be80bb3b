"""Scores of (conversation, response) pairs by the trained reward model: the same code offline and behind Serve."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psyray.cluster import require, use_gpu
from psyray.config import Config
from psyray.needs import scoring
from psyray.records import Message, Row
from psyray.reward.heads import Heads
from psyray.reward.ratings import RATINGS, RatingHeads

FloatArray = npt.NDArray[np.float64]


def chat_tokens(tokenizer: Any, chat: Sequence[Message], max_length: int) -> list[int]:
    """The whole chat, its response last, as tokens; what is too long loses its beginning."""
    text = tokenizer.apply_chat_template(list(chat), tokenize=False).rstrip("\n")
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]
    return [int(i) for i in ids]


def padded(tokens: Sequence[Sequence[int]], pad: int) -> tuple[Any, Any]:
    """(ids, mask): the rows as one tensor, filled up on the right, and where they are."""
    import torch

    ids = torch.full((len(tokens), max(map(len, tokens))), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(tokens):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


class RewardScorer:
    """The reward model's frozen body, and the ensemble of heads on it.

    A feature is the last layer's hidden state at the response's last token: what the model's own score head reads.
    """

    def __init__(
        self,
        model: Path | str,
        heads: Path | None = None,
        *,
        max_length: int = 512,
        batch_size: int = 16,
        gpu: bool = False,
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(model), truncation_side="left")
        device = "cuda" if gpu else "cpu"
        self.model = (
            AutoModelForSequenceClassification.from_pretrained(str(model), dtype=torch.bfloat16).eval().to(device)
        )
        self.heads = Heads.load(heads) if heads else None
        ratings = heads.with_name(RATINGS) if heads else None
        self.ratings = RatingHeads.load(ratings) if ratings and ratings.exists() else None
        self.max_length, self.batch_size, self.device = max_length, batch_size, device

    def scores(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> FloatArray:
        """[N, H] scores in logits: one column per head, or the model's own score without heads."""
        return self._scores(self.features(conversations, responses))

    def explained(
        self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]
    ) -> tuple[FloatArray, list[dict[str, float]] | None]:
        """The scores, and beside them each response's ratings by principle where the heads' folder has such heads."""
        features_ND = self.features(conversations, responses)
        ratings = [self.ratings.explain(row) for row in features_ND] if self.ratings else None
        return self._scores(features_ND), ratings

    def _scores(self, features_ND: FloatArray) -> FloatArray:
        if self.heads:
            return self.heads.scores(features_ND)
        return np.asarray(features_ND @ self.own_head()).reshape(-1, 1)

    def own_head(self) -> FloatArray:
        """[D] weights of the model's own score head."""
        return np.asarray(self.model.score.weight.detach().float().cpu().numpy()[0], dtype=np.float64)

    def features(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> FloatArray:
        """[N, D] features; a chat longer than `max_length` tokens loses its beginning, never the response."""
        tokens = [
            chat_tokens(self.tokenizer, [*messages, {"role": "assistant", "content": response}], self.max_length)
            for messages, response in zip(conversations, responses, strict=True)
        ]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        features: list[Any] = [None] * len(tokens)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, row in zip(batch, self._last_states([tokens[i] for i in batch]), strict=True):
                features[i] = row
        return np.asarray(features, dtype=np.float64)

    def _last_states(self, tokens: list[list[int]]) -> Any:
        import torch

        ids, mask = (filled.to(self.device) for filled in padded(tokens, self.tokenizer.pad_token_id))
        with torch.inference_mode():
            states = self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states[torch.arange(len(tokens)), mask.sum(1) - 1].float().cpu().numpy()


class _Actor:
    """A Ray Data batch function around a scorer."""

    def __init__(self, model: str, heads: Path | None, max_length: int, gpu: bool, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.scorer = RewardScorer(model, heads, max_length=max_length, gpu=gpu)


class FeatureActor(_Actor):
    """Rows {response_id, messages, text} to rows {response_id, features}."""

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        rows: list[Row] = batch.to_pylist()
        features_ND = self.scorer.features([r["messages"] for r in rows], [r["text"] for r in rows])
        found = zip(rows, features_ND, strict=True)
        return pa.Table.from_pylist([{"response_id": r["response_id"], "features": f.tolist()} for r, f in found])


class ScoreActor(_Actor):
    """Rows {key, messages, response} to rows {key, score}, the mean over the heads."""

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        rows: list[Row] = batch.to_pylist()
        scores_NH = self.scorer.scores([r["messages"] for r in rows], [r["response"] for r in rows])
        found = zip(rows, scores_NH.mean(axis=1), strict=True)
        return pa.Table.from_pylist([{"key": r["key"], "score": float(score)} for r, score in found])


def on_actors(actor: type[_Actor], dataset: Any, config: Config, model: Path, heads: Path | None = None) -> Any:
    """The rows that the actors make of the data set's, on a GPU each or on all cores."""
    from ray.data import ActorPoolStrategy

    gpu, threads = use_gpu(config.engine.device), os.cpu_count() or 1
    require(scoring(config.engine, gpu), config.cluster.wait_s, f"the reward model in {model}")
    environment = {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
    placement: dict[str, Any] = {"num_gpus": 1} if gpu else {"num_cpus": 1, "runtime_env": environment}
    return dataset.map_batches(
        actor,
        fn_constructor_args=(str(model), heads, config.reward.train.max_length, gpu, threads),
        batch_size=64,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.engine.replicas),
        **placement,
    )
