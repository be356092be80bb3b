"""Best of n: the policy answers several times, the reward model picks, and the answer says which and why.

    POST /v1/chat/best   {"messages": [...], "of": 4, "caution": 1.0}

`caution` takes so many standard deviations of the reward model's heads off each score before they are compared: a lower
confidence bound, so that an answer that the reward model knows little about has to look better to win.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from serve.chat import MOST, ChatRequest
from serve.guard import words
from serve.reward import ScoreItem


class BestRequest(ChatRequest):
    """A chat request with two words more; how many answers there are, and that they come whole, is settled."""

    of: int = Field(4, ge=2, le=MOST, description="answers to pick from")
    caution: float = Field(0.0, ge=0, le=10, description="standard deviations taken off each score")

    @property
    def answers(self) -> int:
        """How many are asked for."""
        return self.of

    def tree(self) -> dict[str, Any]:
        """The chat request that brings the answers."""
        left_out = {"user", "of", "caution", "stream", "stream_options"}
        return {**self.model_dump(exclude_none=True, exclude=left_out), "n": self.of}

    def conversation(self) -> ScoreItem:
        """What client and therapist said, as the reward model reads it, with the answer still open.

        ValidationError where it does not end in the client's words.
        """
        said = [m for m in self.tree()["messages"] if m["role"] in ("user", "assistant")]
        turns = [{"role": m["role"], "content": words(m["content"])} for m in said]
        return ScoreItem.model_validate({"messages": turns, "response": "-"})


def pick(scores: Sequence[tuple[float, float]], caution: float) -> tuple[int, list[float]]:
    """The place of the best (mean, spread), and the bound mean - caution x spread of each; the first of equals."""
    bounds = [mean - caution * spread for mean, spread in scores]
    return bounds.index(max(bounds)), bounds


def answer(
    completion: dict[str, Any], scores: Sequence[tuple[float, float]], caution: float, model: str
) -> dict[str, Any]:
    """The completion with the picked choice alone, and under `best_of` what each of them scored."""
    place, bounds = pick(scores, caution)
    considered = [
        {"text": choice["message"]["content"], "score": mean, "spread": spread, "bound": bound}
        for choice, (mean, spread), bound in zip(completion["choices"], scores, bounds, strict=True)
    ]
    told = {"picked": place, "by": model, "caution": caution, "considered": considered}
    return {**completion, "choices": [{**completion["choices"][place], "index": 0}], "best_of": told}
