"""Models that think aloud: how a chat template tells them not to, and where what they say begins.

A template that knows the variable `enable_thinking` gets `engine.template`, which turns it off unless told otherwise.
Where a model thinks all the same, `<think>` or its template opens the thought and `</think>` ends it. What stands
before is no answer: never a response, and never searched for a judge's ratings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psyray.records import Message

OPEN, CLOSE = "<think>", "</think>"
CUT_OFF = "cut off while thinking: raise max_tokens, or tell the model not to think aloud (docs/responders.md)"
LAST = 8  # tokens of a prompt in which a template opens a thought


def variables(tokenizer: Any, template: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the variables that the tokenizer's chat template knows; some tokenizers refuse others."""
    return {name: value for name, value in template.items() if name in str(tokenizer.chat_template)}


def prompt_tokens(tokenizer: Any, messages: Sequence[Message], template: Mapping[str, Any]) -> list[int]:
    """The conversation as a model is asked to go on from it."""
    known = variables(tokenizer, template)
    tokens = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False, **known)
    return [int(token) for token in tokens]


def opens(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether the prompt ends within a thought, so that the model's words begin with it."""
    return str(tokenizer.decode(prompt[-LAST:])).rstrip().endswith(OPEN)


def said(text: str) -> str | None:
    """What stands behind the thought, all of a text without one; None where a thought has no end."""
    if CLOSE in text:
        return text.rpartition(CLOSE)[2].strip()
    return None if text.lstrip().startswith(OPEN) else text
