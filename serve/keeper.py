"""The deployment that keeps what is served in step with what is asked for, and changes it under running requests.

It looks (serve/lineup.py), brings up what is missing beside what answers (serve/bring_up.py), hands the new line-up to
the ports, and takes away what nobody needs when they have changed over and the last answers are given. A champion that
does not come up is refused, and the one before goes on answering; a look that fails is noted, and the next one comes
when it is due. If the keeper dies nothing else stops: the next one finds the applications that are there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from ray import serve
from ray.exceptions import RayError
from ray.util.metrics import Gauge

from psyray.errors import PsyrayError
from serve.bring_up import in_a_worker
from serve.lineup import Lineup, Order

ASK_S = 1.0  # how often a port asks for the line-up
AGAIN_S = 600.0  # until one that did not come up is tried again
LINGER_S = 15.0  # by then every port that lives has asked
OWED_S = 30.0  # longest wait for the answers that the ports owe at the end, which may still ask the parts
logger = logging.getLogger("ray.serve")


class Keeper:
    """One replica of it watches for all ports."""

    async def __init__(self, order: Order) -> None:  # type: ignore[misc]  # Serve awaits it
        self.order, self.owner = order, serve.get_replica_context().app_name
        self.now: Lineup | None = None
        self.trouble = ""
        self.refused: tuple[Lineup, float] | None = None  # and when
        about = "1 while the champion that was asked for does not answer"
        self.gauge = Gauge("psyray_champion_trouble", description=about)
        self._looked, self._ended = asyncio.Event(), False
        self._watching = asyncio.create_task(self._watch())

    async def lineup(self) -> Lineup:
        """What answers now; waits for the first one. RuntimeError says why there is none."""
        await self._looked.wait()
        if self.now is None:
            raise RuntimeError(self.trouble)
        return self.now

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
            except Exception as error:
                # A supervisor outlives whatever one look meets (a broken file, a volume or a controller that is away
                # for a while): died, it would take no later champion, and say so to nobody.
                self._note(f"looking for the champion failed: {type(error).__name__}: {error}")
            self._looked.set()
            await asyncio.sleep(self.order.asked.looks_every_s or 3600)

    async def _look(self) -> None:
        if self.now is not None and self.order.asked.looks_every_s is None:
            return
        try:
            wanted = await asyncio.to_thread(self.order.read, self.owner)
        except PsyrayError as error:  # a registry out of reach, or files that are gone: what answers goes on answering
            self._note(str(error))
            return
        if wanted == self.now:
            self._note("")
        elif self.refused is None or self.refused[0] != wanted or time.monotonic() > self.refused[1] + AGAIN_S:
            await self._change(wanted)

    async def _change(self, wanted: Lineup) -> None:
        try:
            await in_a_worker(wanted.parts)
        except RayError as error:  # whatever keeps it from answering, the one before goes on
            self.refused = wanted, time.monotonic()
            cause = getattr(error, "cause", None) or error
            self._note(f"{wanted.models[0].name} ({wanted.models[0].export or 'no id'}) does not come up: {cause}")
            return
        self.now, self.refused = wanted, None
        self._note("")
        self._looked.set()
        logger.warning("%s answers as champion (%s)", wanted.models[0].name, wanted.models[0].export or "no id")
        await asyncio.sleep(LINGER_S)
        await asyncio.to_thread(self._take_away, {part.app for part in wanted.parts})

    def _note(self, trouble: str) -> None:
        if trouble and trouble != self.trouble:
            logger.error("%s", trouble)
        self.trouble = trouble
        self.gauge.set(float(bool(trouble)))

    def _take_away(self, needed: Iterable[str]) -> None:
        """End the parts of this application beside the needed ones; Serve waits for the answers that they owe."""
        for app in serve.status().applications:
            if app.startswith((f"{self.owner}.policy.", f"{self.owner}.reward.")) and app not in needed:
                serve.delete(app, _blocking=False)

    def __del__(self) -> None:
        """Take all parts away where the application itself is; a keeper that is only replaced leaves them."""
        if self._ended:  # Serve calls this, and then Python
            return
        self._ended = True
        own, began = serve.status().applications.get(self.owner), time.monotonic()
        if own is not None and own.status.value != "DELETING":
            return
        while own and own.deployments["Ingress"].replica_states and time.monotonic() < began + OWED_S:
            time.sleep(0.5)
            own = serve.status().applications.get(self.owner)
        self._take_away(())
