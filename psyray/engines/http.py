"""Ratings from an OpenAI-compatible endpoint: concurrent, retried with back-off, one outcome for each row."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from typing import Any

from psyray.config import JudgeSection
from psyray.records import Row
from psyray.rubric import Rubric, UnusableAnswer

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT_S = 60.0


def api_key(section: JudgeSection) -> str:
    """The endpoint's key, from the environment only; empty where it needs none."""
    return os.environ.get(section.api_key_env, "")


class RefusedRequest(Exception):
    """The endpoint gave no answer that a further try could mend."""


class HttpRater:
    """A Ray Data batch function; keeps `concurrency` requests under way."""

    def __init__(self, rubric: Rubric, section: JudgeSection, key: str) -> None:
        self.rubric, self.section = rubric, section
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        return pa.Table.from_pylist(asyncio.run(self._rate_all(batch.to_pylist())))

    async def _rate_all(self, rows: list[Row]) -> list[Row]:
        import aiohttp

        slots = asyncio.Semaphore(self.section.concurrency)
        timeout = aiohttp.ClientTimeout(total=self.section.timeout_s)
        async with aiohttp.ClientSession(headers=self.headers, timeout=timeout) as session:
            return list(await asyncio.gather(*(self._rate(session, slots, row) for row in rows)))

    async def _rate(self, session: Any, slots: asyncio.Semaphore, row: Row) -> Row:
        from psyray.engines.judges import outcome

        started, attempts, cost, text, error = time.monotonic(), 0, 0.0, "", ""
        question = self.rubric.question(row["messages"], row["response"])
        while attempts <= self.section.retries:
            attempts += 1
            try:
                async with slots:
                    text, tokens = await self._ask(session, question)
                cost += self._price(tokens)
                ratings = self.rubric.parse(text)
                spent: Row = {"attempts": attempts, "latency_s": time.monotonic() - started, "cost": cost}
                return outcome(row["key"], ratings, raw_text=text, **spent)
            except UnusableAnswer as problem:
                error = str(problem)
            except RefusedRequest as problem:
                error = str(problem)
                break
            except _Again as again:
                error = str(again)
                if attempts <= self.section.retries:
                    await asyncio.sleep(again.wait(attempts))
        spent = {"attempts": attempts, "latency_s": time.monotonic() - started, "cost": cost}
        return outcome(row["key"], None, raw_text=text, error=error, **spent)

    async def _ask(self, session: Any, question: list[dict[str, str]]) -> tuple[str, dict[str, int]]:
        """The answer's text and token counts; _Again for what may pass, RefusedRequest for what will not."""
        import aiohttp

        body = {
            "model": self.section.model,
            "messages": question,
            "temperature": 0,
            "max_tokens": self.section.max_tokens,
        }
        url = f"{(self.section.url or '').rstrip('/')}/chat/completions"
        try:
            async with session.post(url, json=body) as reply:
                if reply.status in RETRIED:
                    raise _Again(f"HTTP {reply.status}", reply.headers.get("Retry-After"))
                if reply.status != 200:
                    raise RefusedRequest(f"HTTP {reply.status} from {url}")
                answer = json.loads(await reply.text())
        except (aiohttp.ClientError, TimeoutError) as error:  # unreachable, cut off, or too slow
            raise _Again(f"{type(error).__name__} from {url}") from error
        except json.JSONDecodeError as error:
            raise _Again(f"no JSON from {url}") from error
        try:
            return answer["choices"][0]["message"]["content"] or "", answer.get("usage") or {}
        except (KeyError, IndexError, TypeError) as error:
            raise RefusedRequest(f"{url} does not answer in the OpenAI chat format") from error

    def _price(self, tokens: dict[str, int]) -> float:
        prompt, completion = self.section.price_per_million_tokens
        return (tokens.get("prompt_tokens", 0) * prompt + tokens.get("completion_tokens", 0) * completion) / 1e6


class _Again(Exception):
    """A failure that may pass."""

    def __init__(self, what: str, retry_after: str | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after

    def wait(self, attempt: int) -> float:
        """Seconds to wait: what the server asked for, else exponential with full jitter."""
        if self.retry_after and self.retry_after.strip().isdigit():
            return min(float(self.retry_after), LONGEST_WAIT_S)
        return random.uniform(0, min(2.0**attempt, LONGEST_WAIT_S))
