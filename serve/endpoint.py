"""A served run as a client sees it: the names of its policies, an answer piece by piece, the reward model's scores."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from psyray.records import Message

CRISIS = "X-Psyray-Crisis"

T = TypeVar("T")


class NoAnswer(Exception):
    """The server did not do what it was asked; the text says how it failed and nothing of what was said."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer; `crisis` where the server's guard marked it."""

    text: str
    crisis: bool


@dataclass(frozen=True)
class Endpoint:
    """The address of a server in OpenAI's format (serve/app.py), and the token that it asks for."""

    url: str
    token: str = field(repr=False)
    timeout_s: float = 300

    async def names(self) -> list[str]:
        """The models that it lists, without second names such as `champion`; NoAnswer where it does not answer."""
        return await self._json("GET", "/v1/models", None, _names)

    async def answer(self, model: str, messages: Sequence[Message], language: str = "") -> AsyncGenerator[Piece]:
        """A model's answer to a conversation as it is written; NoAnswer where it breaks off.

        `language` is the person's Accept-Language: a guard's fixed reply is in it.
        """
        body = {"model": model, "messages": list(messages), "stream": True}
        url, headers = f"{self.url}/v1/chat/completions", {"Accept-Language": language} if language else None
        try:
            async with self._session() as session, session.post(url, json=body, headers=headers) as reply:
                _check(reply)
                crisis = reply.headers.get(CRISIS) == "true"
                async for line in reply.content:
                    if (data := line.decode().strip().removeprefix("data:").strip()) == "[DONE]":
                        return
                    if data and (text := _delta(json.loads(data))):
                        yield Piece(text, crisis)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NoAnswer(type(error).__name__) from error
        except (ValueError, LookupError, TypeError) as error:  # not what OpenAI's format says
            raise NoAnswer("it sent what is no chat stream") from error
        raise NoAnswer("it broke off")

    async def scores(self, messages: Sequence[Message], responses: Sequence[str]) -> list[dict[str, Any]]:
        """{score, spread, principles} of each response by the reward model; NoAnswer where there is none."""
        items = [{"messages": list(messages), "response": response} for response in responses]
        keys = ("score", "spread", "principles")
        return await self._json(
            "POST",
            "/reward/score",
            {"items": items},
            lambda said: [{key: said["scores"][place][key] for key in keys} for place in range(len(items))],
        )

    async def _json(self, method: str, path: str, body: Any, read: Callable[[Any], T]) -> T:
        """What `read` finds in the reply."""
        try:
            async with self._session() as session, session.request(method, self.url + path, json=body) as reply:
                _check(reply)
                return read(await reply.json())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NoAnswer(type(error).__name__) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise NoAnswer(f"its reply to {path} is not what was expected") from error

    def _session(self) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=self.timeout_s))


def _names(said: dict[str, Any]) -> list[str]:
    own = {str(model["id"]): str((model.get("metadata") or {}).get("name", model["id"])) for model in said["data"]}
    return [name for name, means in own.items() if means == name or means not in own]


def _check(reply: aiohttp.ClientResponse) -> None:
    if reply.status != 200:
        raise NoAnswer(f"it answered {reply.status}")


def _delta(chunk: dict[str, Any]) -> str:
    """The words that a chunk of a stream adds."""
    if "error" in chunk:
        raise NoAnswer("it broke off")
    return str((chunk["choices"][0]["delta"].get("content") if chunk["choices"] else "") or "")
