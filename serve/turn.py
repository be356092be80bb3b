"""One turn of a conversation with two policies: the person's words, both answers as they come, and who stands where."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from psyray.active.votes import Choice, Vote
from psyray.records import Message, content_id
from serve.endpoint import Endpoint, NoAnswer

SIDES = ("left", "right")


@dataclass
class Turn:
    """A person's words with both answers as far as they have come; `policies` by side."""

    messages: list[Message]
    policies: dict[str, str]
    a_left: bool
    turn_id: str
    texts: dict[str, str] = field(default_factory=lambda: dict.fromkeys(SIDES, ""))
    failed: dict[str, str] = field(default_factory=dict)
    crisis: bool = False
    ready_at: float = 0.0  # Unix seconds when both answers were there; 0 before
    scores: list[dict[str, Any]] | None = None  # left, right
    seen: bool = False
    choice: Choice | None = None
    choosing: threading.Lock = field(default_factory=threading.Lock)  # held while a choice is written down

    @classmethod
    def draw(cls, messages: list[Message], models: tuple[str, str]) -> Turn:
        """A new turn; A is the first policy by name, and whether it stands on the left follows from the turn's id."""
        turn_id = uuid.uuid4().hex
        a_left = bool(int(content_id("side", turn_id), 16) % 2)
        return cls(messages, dict(zip(SIDES, sorted(models, reverse=not a_left), strict=True)), a_left, turn_id)

    @property
    def a_first(self) -> tuple[str, str]:
        """The sides of A and of B."""
        return ("left", "right") if self.a_left else ("right", "left")

    @property
    def same(self) -> bool:
        """Whether there is nothing to choose: a guard's fixed reply, or two policies of one mind."""
        return self.texts["left"].strip() == self.texts["right"].strip()

    def settle(self, choice: Choice, write: Callable[[], Vote] | None) -> Choice:
        """The turn's choice, for good: the first that was written down, or where `write` is none, that came.

        Blocks while another is written. A choice that could not be written is none: what `write` raises is raised.
        """
        with self.choosing:
            if self.choice is None:
                self.choice = write().choice(self.a_left) if write else choice
            return self.choice

    async def events(self, endpoint: Endpoint, language: str = "") -> AsyncGenerator[dict[str, Any]]:
        """What happens, as it happens: words of a side, a side's end or failure, and what came out at the end.

        `language` is the person's Accept-Language.
        """
        came: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        work = [asyncio.create_task(self._answer(endpoint, side, language, came.put)) for side in SIDES]
        open_sides = len(SIDES)
        try:
            yield {"turn_id": self.turn_id}
            while open_sides:
                event = await came.get()
                open_sides -= "ended" in event
                yield event
            if not self.failed:
                self.ready_at = time.time()
            yield {"whole": not self.failed, "same": self.same, "crisis": self.crisis}
        finally:  # who reads may have gone: nobody waits for the rest
            for task in work:
                task.cancel()

    async def _answer(
        self, endpoint: Endpoint, side: str, language: str, put: Callable[[dict[str, Any]], Awaitable[None]]
    ) -> None:
        self.failed[side] = "it broke off"  # unless it comes to its end
        try:
            async for piece in endpoint.answer(self.policies[side], self.messages, language):
                self.texts[side] += piece.text
                self.crisis |= piece.crisis
                await put({"side": side, "text": piece.text})
            if not self.texts[side].strip():
                raise NoAnswer("it said nothing")
            del self.failed[side]
        except NoAnswer as error:
            self.failed[side] = str(error)
        finally:
            await put({"side": side, "ended": self.failed.get(side, "")})
