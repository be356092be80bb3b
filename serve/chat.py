"""A chat request in OpenAI's format, as far as this server offers it: every field is known and has its bounds.

What an engine would also take (tools, templates, grammars, images, its own extensions) is refused with the field's
name: nobody here needs it, and each is a way to stop an engine that others share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from serve.access import MAX_MESSAGES
from serve.refusals import Strict
from serve.reward import MAX_CHARS

MOST = 16  # answers to one request
MAX_CHAT_CHARS = 100_000  # of one request's messages: some 25,000 tokens; the port itself reads them, one after another
Stop = Annotated[str, Field(min_length=1, max_length=200)]


@dataclass(frozen=True)
class Refusal:
    """What an engine says instead of an answer: an HTTP status and why."""

    status: int
    words: str


class Piece(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str = Field(max_length=MAX_CHARS)


class Said(Strict):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_CHARS)] | Annotated[list[Piece], Field(min_length=1, max_length=64)]
    name: str | None = Field(None, max_length=64)

    @property
    def length(self) -> int:
        """Characters of all that it says."""
        return len(self.content) if isinstance(self.content, str) else sum(len(piece.text) for piece in self.content)


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(Strict):
    """What may be asked; what is left out is the policy's own (serve/policy.py) or OpenAI's default."""

    messages: list[Said] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = Field(None, max_length=128, description="a name of /v1/models; none: the champion")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    n: int | None = Field(None, ge=1, le=MOST)
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="read by nobody")

    @model_validator(mode="after")
    def fits_together(self) -> Self:
        if not any(message.role == "user" for message in self.messages):
            raise ValueError("messages: none has the role 'user'")
        if (total := sum(message.length for message in self.messages)) > MAX_CHAT_CHARS:
            raise ValueError(f"messages: {total} characters in one request; at most {MAX_CHAT_CHARS}")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        return self

    @property
    def answers(self) -> int:
        """How many are asked for."""
        return self.n or 1

    def tokens(self, default: int) -> int:
        """New tokens that all answers together may have; `default` is one's where the client names no length."""
        return self.answers * (max(self.max_tokens or 0, self.max_completion_tokens or 0) or default)

    def tree(self) -> dict[str, Any]:
        """What the client gave, as plain data."""
        return self.model_dump(exclude_none=True, exclude={"user"})
