"""A stand-in for an OpenAI-compatible judge that rates and compares by marks in the texts; for tests only.

A response with more `+` is better. A client who says "biased" gets whoever is shown first; "odd" no usable answer;
"moody" whoever is shown first when it is asked for the first time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from endpoint import served


class Comparing:
    """Keeps the prompts; `marks` tells where the client, A and B (or the one response) stand in one."""

    def __init__(self, marks: tuple[str, str, str, str]) -> None:
        self.marks, self.calls, self.url = marks, list[str](), ""

    def answer(self, model: str, prompt: str) -> str:
        self.calls.append(prompt)
        one, a, b, keys = self.marks
        if a not in prompt:
            plus = prompt.split(one)[1].split("\n\n")[0].count("+")
            return json.dumps(dict.fromkeys(re.search(keys, prompt)[1].split(", "), plus))
        first, second = prompt.split(a)[1].split(b)
        first, second = first.count("+"), second.split("\n\n")[0].count("+")
        if "biased" in prompt or ("moody" in prompt and self.calls.count(prompt) == 1):
            return "A"
        if "odd" in prompt:
            return "Both have their merits."
        return "A" if first > second else "B" if second > first else "tie"


@contextmanager
def comparing_server(one: str, a: str, b: str, keys: str) -> Iterator[Comparing]:
    judge = Comparing((one, a, b, keys))
    with served(judge.answer) as endpoint:
        judge.url = endpoint.url
        yield judge
