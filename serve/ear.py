"""A second ear: a model that the operator names is asked about client words that hold no phrase of psyray/crisis.py.

    serve run serve.app:build run=RUN ask=http://127.0.0.1:8100/v1 ask_model=NAME

It is asked at an OpenAI-compatible chat endpoint, in the words of psyray/assets/crisis_question.txt, and answers `yes`
or `no`; anything else is no answer. Without `ask` no word goes anywhere. Nothing that is said is logged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import aiohttp

from psyray import crisis
from psyray.addresses import refuse_secret
from psyray.errors import PsyrayError

QUESTION = (Path(crisis.__file__).parent / "assets/crisis_question.txt").read_text()
YES, NO = "yes", "no"
LAST, CHARS = 16, 8_000  # of a client's texts the last so many, and of these the last characters: some 2,000 tokens
AT_ONCE = 64  # questions under way, of one replica; others wait, within their time
TOKENS = 8
_ANSWER = re.compile(r"\W*(yes|no)\W*", re.IGNORECASE)
_MARKS = str.maketrans("<>[]", "()()")  # a chat template would read `<|im_end|>` or `[/INST]` as its own


@dataclass(frozen=True)
class Ask:
    """Whom to ask, with the endpoint's key; `failed` says what becomes of words that it gives no answer about."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout_s: float = 5.0
    failed: Literal["flag", "pass"] = "pass"

    @classmethod
    def of(cls, url: str, model: str, key_env: str, **more: Any) -> Self:
        """With the key from the environment, where `key_env` names one; PsyrayError says what is wrong."""
        refuse_secret("ask", url, "ask_key_env", key_env)
        if not url.startswith(("http://", "https://")) or not model:
            raise PsyrayError("ask is a URL, http://HOST:PORT/v1, and ask_model the name of a model there; give both")
        key = os.environ.get(key_env, "").strip()
        if key_env and not key:
            raise PsyrayError(f"ask_key_env={key_env}: there is no key in ${key_env}")
        return cls(url.rstrip("/"), model, key, **more)


class Ear:
    """Asks; lives in an event loop."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.well = True  # whether the last question was answered
        self._told: set[str] = set()
        self._session: aiohttp.ClientSession | None = None

    async def hear(self, texts: Sequence[str]) -> str:
        """What it says of a client's texts, YES or NO, or why it does not: `timeout`, `http 401`, ..."""
        try:
            async with asyncio.timeout(self.ask.timeout_s):
                answer = await self._post(question(texts))
        except TimeoutError:
            answer = "timeout"
        self.well = answer in (YES, NO)
        if not self.well and answer not in self._told:
            self._told.add(answer)
            logging.getLogger("ray.serve").error(
                "%s at %s gave no answer about a client's words: %s; later ones are only counted",
                self.ask.model, self.ask.url, answer,
            )  # fmt: skip
        return answer

    async def _post(self, words: str, *, again: bool = True) -> str:
        messages = [{"role": "user", "content": words}]
        body = {"model": self.ask.model, "messages": messages, "temperature": 0, "max_tokens": TOKENS}
        try:
            # A redirect could lead to a host that nobody configured.
            url = f"{self.ask.url}/chat/completions"
            async with self._connections().post(url, json=body, allow_redirects=False) as reply:
                if reply.status != 200:
                    return f"http {reply.status}"
                return read(await reply.json(content_type=None))
        except (aiohttp.ClientError, OSError):  # also a kept connection that the other end has closed meanwhile
            return await self._post(words, again=False) if again else "connection"
        except (ValueError, RecursionError):  # no JSON
            return "unclear"

    def _connections(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self.ask.key}"} if self.ask.key else None,
                timeout=aiohttp.ClientTimeout(total=None),  # `hear` has one for both tries, and the wait before them
                connector=aiohttp.TCPConnector(limit=AT_ONCE),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def close(self) -> None:
        """Let go of the connections."""
        if self._session is not None:
            await self._session.close()


def question(texts: Sequence[str]) -> str:
    """What is asked about a client's texts: they are quoted, so that none of them can end its quotes."""
    kept, room = list[str](), CHARS
    for text in reversed(texts[-LAST:]):
        if room > 0:
            kept.insert(0, text[-room:].translate(_MARKS))
            room -= len(text)
    return QUESTION.replace("{texts}", json.dumps(kept, ensure_ascii=False))


def read(completion: Any) -> str:
    """YES, NO, or `unclear` for any other answer."""
    try:
        said = _ANSWER.fullmatch(completion["choices"][0]["message"]["content"])
    except (LookupError, TypeError):  # not what OpenAI's format says
        return "unclear"
    return said[1].lower() if said else "unclear"
