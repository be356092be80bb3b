"""What `/healthz` tells, and what a flood of it costs."""

from __future__ import annotations

import asyncio

from serve.health import Health


class Engine:
    """A stand-in for what is looked at: counts looks, and is as well as it says."""

    def __init__(self) -> None:
        self.looks, self.well, self.takes_s = 0, True, 0.0

    async def look(self) -> None:
        self.looks += 1
        await asyncio.sleep(self.takes_s)
        if not self.well:
            raise RuntimeError("psyray-round-2 on node 10.0.0.3 is ill")


def test_a_flood_is_one_look_a_second_and_changes_are_seen_after_it() -> None:
    engine = Engine()

    async def ask() -> None:
        health = Health(engine.look, stands_s=0.2)
        engine.takes_s = 0.05
        replies = await asyncio.gather(*(health.reply() for _ in range(100)))
        assert {reply.status_code for reply in replies} == {200} and engine.looks == 1
        engine.well = False
        assert (await health.reply()).status_code == 200 and engine.looks == 1
        await asyncio.sleep(0.25)
        told = await health.reply()
        assert (told.status_code, told.body) == (503, b'{"status":"unavailable"}') and engine.looks == 2
        engine.well = True
        await asyncio.sleep(0.25)
        assert (await health.reply()).body == b'{"status":"ok"}'

    asyncio.run(ask())


def test_one_who_goes_away_takes_nobodys_answer_with_him() -> None:
    engine = Engine()
    engine.takes_s = 0.1

    async def ask() -> None:
        health = Health(engine.look)
        first, second = (asyncio.create_task(health.reply()) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        assert (await second).status_code == 200 and engine.looks == 1

    asyncio.run(ask())
