"""What a chat request may hold, and what the engine never sees."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serve.chat import ChatRequest

CLIENT = {"role": "user", "content": "The flat is too quiet."}


def test_what_the_client_gave_is_passed_on_and_nothing_else() -> None:
    parts = [{"type": "text", "text": "I see"}, {"type": "text", "text": "it."}]
    given = {
        "messages": [{"role": "system", "content": parts}, CLIENT],
        "temperature": 0.0,
        "stop": ["."],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 3,
        "seed": 5,
    }
    assert ChatRequest.model_validate({**given, "user": "somebody", "n": None}).tree() == given


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []),
        ("chat_template", "{{ 1 }}"),
        ("request_id", "another's"),
        ("cache_salt", "another's"),
        ("response_format", {"type": "json_object"}),
        ("n", 17),
        ("n", 0),
        ("temperature", float("nan")),
        ("temperature", "1e999"),
        ("top_p", 0),
        ("max_tokens", -1),
        ("max_tokens", 2**70),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", ["x"] * 9),
        ("stop", "x" * 201),
        ("top_logprobs", 21),
        ("top_logprobs", 1),
        ("stream_options", {"include_usage": True}),
        ("messages", []),
        ("messages", [CLIENT] * 1025),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": "lone \ud800 surrogate"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://host/"}}]}]),
        ("messages", [{"role": "user", "content": "x" * 16_001}]),
        ("messages", [CLIENT | {"tool_calls": []}]),
        ("messages", [{"role": "assistant", "content": "nobody asked"}]),
    ],
)
def test_what_is_unknown_or_out_of_bounds_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"messages": [CLIENT], field: value})


@pytest.mark.parametrize("content", ["x" * 10_000, [{"type": "text", "text": "x" * 5_000}] * 2])
def test_the_messages_of_a_request_are_bounded_together(content: Any) -> None:
    messages = [{"role": role, "content": content} for role in ("system", "user", "assistant", "user", "assistant") * 2]
    assert len(ChatRequest.model_validate({"messages": messages}).messages) == 10
    with pytest.raises(ValidationError, match="110000 characters in one request; at most 100000"):
        ChatRequest.model_validate({"messages": [*messages, {"role": "user", "content": content}]})
