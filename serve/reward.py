"""The reward model as a deployment: `POST /reward/score` scores answers to conversations.

    {"items": [{"messages": [{"role": "user", "content": "..."}], "response": "..."}]}
    -> {"model": "psyray-reward", "scores": [{"score": 0.41, "spread": 0.08, "principles": {"empathy": 3.9, ...}}]}

Requests that arrive together share a forward pass. A score is the mean over the ensemble's heads, in the reward
model's own unit; `spread` is their standard deviation, 0 where there is one head; `principles` are the ratings that a
judge is expected to give, null where the run's judge gave none to learn from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from psyray.records import Message

MAX_ITEMS = 256
MAX_MESSAGES = 64
MAX_CHARS = 16_000  # of one text
MAX_TOTAL_CHARS = 2_000_000  # of one request
MAX_TOGETHER = 64  # requests that share a pass


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


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


class Scorer(Protocol):
    def explained(
        self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]
    ) -> tuple[npt.NDArray[np.floating[Any]], Sequence[dict[str, float]] | None]: ...


def score_together(scorer: Scorer, requests: Sequence[Sequence[ScoreItem]]) -> list[list[Score]]:
    """The scores of several requests from one call to the scorer, each request's in its own order."""
    items = [item for request in requests for item in request]
    conversations = [[turn.model_dump() for turn in item.messages] for item in items]
    scores_NH, ratings = scorer.explained(conversations, [item.response for item in items])
    together = [Score(score=float(row.mean()), spread=float(row.std())) for row in scores_NH]
    if ratings is not None:
        for score, said in zip(together, ratings, strict=True):
            score.principles = said
    ends = np.cumsum([len(request) for request in requests])
    return [together[end - len(request) : end] for end, request in zip(ends, requests, strict=True)]


class RewardServer:
    """The deployment: holds the reward model; `score` may be called by many requests at once."""

    def __init__(self, path: str, heads: str | None, max_length: int, *, gpus: float = 0.0) -> None:
        from psyray.reward.body import Body, Reading
        from psyray.reward.engine_body import EngineBody
        from psyray.reward.score import FeatureBody, RewardScorer

        def body_of(reading: Reading) -> FeatureBody:
            if reading == Reading():
                return EngineBody(path, max_length=max_length, max_num_seqs=MAX_TOGETHER, gpus=gpus)
            return Body(path, [reading], max_length=max_length, gpu=gpus > 0)  # vLLM does not give what those read

        self.scorer: Scorer = RewardScorer(path, Path(heads) if heads else None, body_of=body_of)

    @serve.batch(max_batch_size=MAX_TOGETHER, batch_wait_timeout_s=0.005)  # type: ignore[untyped-decorator]
    async def score(self, requests: list[list[ScoreItem]]) -> list[list[Score]]:
        """One list of scores for each request; off the event loop, so that the next batch can gather meanwhile."""
        return await asyncio.to_thread(score_together, self.scorer, requests)
