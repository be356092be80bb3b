"""The reward model as a deployment: `POST /reward/score` scores answers to conversations.

    {"items": [{"messages": [{"role": "user", "content": "..."}], "response": "..."}]}
    -> {"model": "psyray-reward", "scores": [{"score": 0.41, "spread": 0.08, "principles": {"empathy": 3.9, ...}}]}

Requests that arrive together share the engine's steps. A score is the mean over the ensemble's heads, in the reward
model's own unit; `spread` is their standard deviation, or that of the posterior where it is known, 0 where there is one
head; `principles` are the ratings that a judge is expected to give, null where the run's judge gave none to learn from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator
from ray import serve

from psyray.arrays import FloatArray
from serve.access import MAX_MESSAGES
from serve.refusals import Strict

if TYPE_CHECKING:
    from psyray.reward.body import Body, Chat
    from psyray.reward.engine_body import EngineBody
    from psyray.reward.uncertainty import Belief

MAX_ITEMS = 256
MAX_CHARS = 16_000  # of one text
MAX_TOTAL_CHARS = 2_000_000  # of one request
MAX_TOGETHER = 64  # texts that are read at once


class Turn(Strict):
    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1, max_length=MAX_CHARS)


class ScoreItem(Strict):
    """A conversation that ends in the client's words, and an answer to it."""

    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    response: str = Field(min_length=1, max_length=MAX_CHARS)

    @model_validator(mode="after")
    def ends_with_the_client(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError("the last of `messages` must have the role 'user'; the answer goes into `response`")
        return self


class ScoreRequest(Strict):
    items: list[ScoreItem] = Field(min_length=1, max_length=MAX_ITEMS)

    @model_validator(mode="after")
    def is_not_too_much(self) -> Self:
        total = sum(len(i.response) + sum(len(m.content) for m in i.messages) for i in self.items)
        if total > MAX_TOTAL_CHARS:
            raise ValueError(f"{total} characters in one request; at most {MAX_TOTAL_CHARS}: send fewer items")
        return self


class Score(BaseModel):
    score: float
    spread: float
    principles: dict[str, float] | None = None


class ScoreReply(BaseModel):
    model: str
    scores: list[Score]


class ReadsFeatures(Protocol):
    """The heads of a reward model."""

    def belief(self, features_ND: FloatArray) -> Belief: ...

    def ratings(self, features_ND: FloatArray) -> Sequence[dict[str, float]] | None: ...


def judged(heads: ReadsFeatures, features_ND: FloatArray) -> list[Score]:
    """What the heads say of answers by their features."""
    belief = heads.belief(features_ND)
    ratings: Sequence[dict[str, float] | None] = heads.ratings(features_ND) or [None] * len(belief.mean_N)
    found = zip(*belief, ratings, strict=True)
    return [Score(score=float(mean), spread=float(spread), principles=said) for mean, spread, said in found]


def features_together(body: Body, requests: Sequence[Sequence[Chat]]) -> list[FloatArray]:
    """The features of several requests from one call to the body, each request's in its own order."""
    features_ND = body.features([chat for request in requests for chat in request])
    return np.split(features_ND, np.cumsum([len(request) for request in requests])[:-1])


class Gathered:
    """A body of this process, for what vLLM does not give, or where it cannot run; requests together share batches."""

    def __init__(self, body: Body) -> None:
        self.body = body

    async def features(self, chats: Sequence[Chat]) -> FloatArray:
        """[N, D], by a thread: meanwhile the next requests gather."""
        return np.asarray(await self._together(chats))

    async def check_health(self) -> None:
        """It lives as long as its process."""

    @serve.batch(max_batch_size=MAX_TOGETHER, batch_wait_timeout_s=0.005)  # type: ignore[untyped-decorator]
    async def _together(self, requests: list[Sequence[Chat]]) -> list[FloatArray]:
        return await asyncio.to_thread(features_together, self.body, requests)


class RewardServer:
    """The deployment: holds the reward model; `score` may be called by many requests at once."""

    def __init__(self, path: str, heads: str | None, max_length: int, *, gpus: float = 0.0) -> None:
        from psyray.reward.body import Body, Reading
        from psyray.reward.engine_body import EngineBody, engine_runs
        from psyray.reward.score import ScoreHeads

        self.heads = ScoreHeads(path, Path(heads) if heads else None)
        self.body: EngineBody | Gathered = (
            EngineBody(path, max_length=max_length, max_num_seqs=MAX_TOGETHER, gpus=gpus)
            if self.heads.reading == Reading() and engine_runs(gpus)
            else Gathered(Body(path, [self.heads.reading], max_length=max_length, gpu=gpus > 0))
        )

    async def score(self, items: Sequence[ScoreItem]) -> list[Score]:
        """One score for each item."""
        from psyray.reward.score import chats

        conversations = [[turn.model_dump() for turn in item.messages] for item in items]
        return judged(self.heads, await self.body.features(chats(conversations, [item.response for item in items])))

    async def check_health(self) -> None:
        """Serve asks this, and replaces a replica that raises."""
        await self.body.check_health()
