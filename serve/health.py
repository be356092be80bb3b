"""Whether a server is well, for anyone who asks: one word without a name, and at most one look a second behind it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from starlette.responses import JSONResponse

STANDS_S = 1.0  # how long an answer is given again


class Health:
    """The answer to `/healthz`, which asks for no key and counts for no limit: a flood of it costs no look more."""

    def __init__(
        self,
        look: Callable[[], Awaitable[object]],
        stands_s: float = STANDS_S,
        beside: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """`look` raises where something ails; `beside` tells of what the server answers without."""
        self.look, self.stands_s, self.beside = look, stands_s, beside
        self._looking: asyncio.Task[bool] | None = None
        self._until = 0.0

    async def reply(self) -> JSONResponse:
        """200, or 503 where something ails."""
        if self._looking is None or (self._looking.done() and time.monotonic() > self._until):
            self._looking = asyncio.create_task(self._well())
        well = await asyncio.shield(self._looking)  # others wait for it who stay when this one goes away
        told = {"status": "ok" if well else "unavailable", **self.beside()}
        return JSONResponse(told, 200 if well else 503)

    async def _well(self) -> bool:
        try:
            await self.look()
        except Exception as error:  # whatever ails, the answer to this question is "not well"
            logging.getLogger("ray.serve").error("health: %s", type(error).__name__)
            return False
        finally:
            self._until = time.monotonic() + self.stands_s
        return True
