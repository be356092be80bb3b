"""Scores of (conversation, response) pairs by the trained reward model: the same code offline and behind Serve."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psyray.arrays import FloatArray
from psyray.cluster import require, use_gpu
from psyray.config import Config
from psyray.needs import scoring
from psyray.records import Message, Row
from psyray.reward.body import Body, Reading
from psyray.reward.heads import Heads, own_head
from psyray.reward.ratings import RATINGS, RatingHeads
from psyray.reward.uncertainty import Belief


def chats(conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> list[list[Message]]:
    """Each conversation with its response as the last message."""
    return [
        [*messages, {"role": "assistant", "content": response}]
        for messages, response in zip(conversations, responses, strict=True)
    ]


class ScoreHeads:
    """What makes scores of features: the ensemble of heads or the model's own, and the ratings beside it.

    A feature is what the heads were fitted on, as their file says. Without heads it is the last layer's state at the
    response's last token: what the model's own score head reads.
    """

    def __init__(self, model: Path | str, heads: Path | None = None) -> None:
        self.heads = Heads.load(heads) if heads else own_head(Path(model))
        ratings = heads.with_name(RATINGS) if heads else None
        self._ratings = RatingHeads.load(ratings) if ratings and ratings.exists() else None
        self.reading = self.heads.reading if isinstance(self.heads, Heads) else Reading()

    def scores(self, features_ND: FloatArray) -> FloatArray:
        """[N, H] scores in logits: one column per head, or the model's own score without heads."""
        if isinstance(self.heads, Heads):
            return self.heads.scores(features_ND)
        return (features_ND @ self.heads)[:, None]

    def belief(self, features_ND: FloatArray) -> Belief:
        """Each score and how unsure it is; the model's own score knows no doubt."""
        if isinstance(self.heads, Heads):
            return self.heads.belief(features_ND)
        return Belief(features_ND @ self.heads, np.zeros(len(features_ND)))

    def ratings(self, features_ND: FloatArray) -> list[dict[str, float]] | None:
        """Each response's ratings by principle, where the heads' folder has heads for them."""
        return [self._ratings.explain(row) for row in features_ND] if self._ratings else None


class RewardScorer:
    """The reward model's frozen body, and its heads."""

    def __init__(
        self,
        model: Path | str,
        heads: Path | None = None,
        *,
        max_length: int = 512,
        batch_size: int = 16,
        gpu: bool = False,
    ) -> None:
        self.heads = ScoreHeads(model, heads)
        self.body = Body(model, [self.heads.reading], max_length=max_length, batch_size=batch_size, gpu=gpu)

    def scores(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> FloatArray:
        """[N, H] scores in logits."""
        return self.heads.scores(self.features(conversations, responses))

    def features(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> FloatArray:
        """[N, D] features; a chat longer than `max_length` tokens loses its beginning, never the response."""
        return self.body.features(chats(conversations, responses))


class FeatureActor:
    """Rows {response_id, messages, text} to rows {response_id, features}: a Ray Data batch function."""

    def __init__(self, model: str, reading: Reading, max_length: int, gpu: bool, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.body = Body(model, [reading], max_length=max_length, gpu=gpu)

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        rows: list[Row] = batch.to_pylist()
        features_ND = self.body.features(chats([r["messages"] for r in rows], [r["text"] for r in rows]))
        found = zip(rows, features_ND, strict=True)
        return pa.Table.from_pylist([{"response_id": r["response_id"], "features": f.tolist()} for r, f in found])


class ScoreActor:
    """Rows {key, messages, response} to rows {key, score}, as the heads believe it: a Ray Data batch function."""

    def __init__(self, model: str, heads: Path | None, max_length: int, gpu: bool, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.scorer = RewardScorer(model, heads, max_length=max_length, gpu=gpu)

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        rows: list[Row] = batch.to_pylist()
        features_ND = self.scorer.features([r["messages"] for r in rows], [r["response"] for r in rows])
        found = zip(rows, self.scorer.heads.belief(features_ND).mean_N, strict=True)
        return pa.Table.from_pylist([{"key": r["key"], "score": float(score)} for r, score in found])


def on_actors(
    actor: type[FeatureActor | ScoreActor], dataset: Any, config: Config, model: Path, read: Reading | Path | None
) -> Any:
    """The rows that the actors make of the data set's, on a GPU each or on all cores.

    `read`: what features they give, or the heads that they score by (none: the model's own).
    """
    from ray.data import ActorPoolStrategy

    gpu, threads = use_gpu(config.engine.device), os.cpu_count() or 1
    require(scoring(config.engine, gpu), config.cluster.wait_s, f"the reward model in {model}")
    environment = {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
    placement: dict[str, Any] = {"num_gpus": 1} if gpu else {"num_cpus": 1, "runtime_env": environment}
    return dataset.map_batches(
        actor,
        fn_constructor_args=(str(model), read, config.reward.train.max_length, gpu, threads),
        batch_size=64,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.engine.replicas),
        **placement,
    )
