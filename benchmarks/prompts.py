"""Client speeches for a benchmark, as many as it wants and each another. No benchmark by itself."""

from __future__ import annotations

import json
from functools import cache

from psyray.data.speeches import SHIPPED
from psyray.records import Message


@cache
def _speeches() -> list[str]:
    return [json.loads(line)["text"] for line in SHIPPED.read_text().splitlines()]


def conversation(number: int) -> list[Message]:
    """One shipped speech; the number before it makes each prompt another."""
    texts = _speeches()
    return [{"role": "user", "content": f"({number}) {texts[number % len(texts)]}"}]
