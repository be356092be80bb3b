"""A served run under steady load for a while, one of its processes killed now and then: what was lost, what memory did.

    python benchmarks/soak.py --minutes 30 --kill-every 3
    python benchmarks/soak.py --minutes 2 --kill-every 1

The application serves tiny random models, so that the machine is busy with serving and not with arithmetic. Clients ask
for chats, streamed chats and scores at a steady rate, whether or not answers come back. Every --kill-every minutes a
replica is killed with SIGKILL, by the pid that Serve reports for it and only where that process is this benchmark's
own: the engine, the reward model, the port and the keeper in turn. A request may fail only if it was under way through
the killed replica at that moment; all others must be answered, however long the replica takes to come back. Memory is
the proportional set size of all processes, the benchmark's own among them, and its mean in the last third is held
against the first third, whose first minute does not count. Exit status 1 where another request failed, or where memory
grew by more than --growth. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from made_champion import bearer, made_run, up
from prompts import conversation
from ray.serve.context import _get_global_client
from resources import GIB, sample

SETTLE_S = 60.0  # of the start, which the first third leaves out
PAUSE_S = 5.0  # between two samples of memory
PATIENCE_S = 300.0
CHAT, SCORE = "/v1/chat/completions", "/reward/score"
# Which requests go through a replica of which deployment.
THROUGH = {
    "policy": {"chat", "stream"},
    "reward": {"score"},
    "Ingress": {"chat", "stream", "score"},
    "Keeper": set[str](),
}


@dataclass(frozen=True)
class Asked:
    """One request: when it was under way, in seconds of the monotonic clock, and whether it was answered."""

    kind: str
    began: float
    ended: float
    outcome: str  # "ok", a status, or the class of the error


@dataclass(frozen=True)
class Kill:
    """A replica's end: from before the signal until its process was gone."""

    what: str
    at: float
    gone: float

    def excuses(self, asked: Asked) -> bool:
        """Whether the request was under way through the replica."""
        return asked.kind in THROUGH[self.what] and asked.began <= self.gone and self.at <= asked.ended


def pid_of(what: str) -> int:
    """The pid of a replica, as Serve reports it."""
    for name, app in _get_global_client().get_serve_details()["applications"].items():
        for deployment, known in app["deployments"].items():
            if what in (deployment, name.split(".")[1] if "." in name else ""):
                return int(known["replicas"][0]["pid"])
    sys.exit(f"no replica of {what} is up")


def kill(what: str) -> Kill:
    """End a replica of this benchmark's own Ray."""
    process = psutil.Process(pid_of(what))
    if os.getpid() not in {parent.pid for parent in process.parents()}:
        sys.exit(f"the replica of {what} (pid {process.pid}) is not a process of this benchmark; nothing was killed")
    at = time.monotonic()
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    return Kill(what, at, time.monotonic())


class Memory(threading.Thread):
    """Samples of the memory of this process and all under it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.began, self.stop_now = time.monotonic(), threading.Event()
        self.samples: list[tuple[float, int]] = []
        self.known = {os.getpid(): psutil.Process()}

    def run(self) -> None:
        while not self.stop_now.wait(PAUSE_S):
            self.samples.append((time.monotonic() - self.began, sum(sample(self.known).values())))

    def thirds(self) -> tuple[float, float]:
        """Mean GiB in the first third, after the start has settled, and in the last."""
        end = self.samples[-1][0]
        first = [size for at, size in self.samples if min(SETTLE_S, end / 6) < at <= end / 3]
        last = [size for at, size in self.samples if at > 2 * end / 3]
        return statistics.mean(first) / GIB, statistics.mean(last) / GIB


async def ask(session: aiohttp.ClientSession, url: str, kind: str, number: int) -> Asked:
    """One request of a kind, to its end."""
    said = conversation(number)
    body: dict[str, Any] = {"messages": said, "max_tokens": 8, "stream": kind == "stream"}
    if kind == "score":
        body = {"items": [{"messages": said, "response": "That sounds lonely."}]}
    began = time.monotonic()
    try:
        async with session.post(url + (SCORE if kind == "score" else CHAT), json=body, headers=bearer()) as reply:
            text = await reply.text()
            whole = kind != "stream" or text.endswith("data: [DONE]\n\n")
            outcome = ("ok" if whole else "cut off") if reply.status == 200 else str(reply.status)
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome = type(error).__name__
    return Asked(kind, began, time.monotonic(), outcome)


async def soak(url: str, seconds: float, kill_every: float, rate: float) -> tuple[list[Asked], list[Kill]]:
    """All requests of the time, and the kills in it."""
    limit, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=PATIENCE_S)
    under_way: list[asyncio.Task[Asked]] = []
    kills: list[Kill] = []
    kinds, turns = cycle(("chat", "score", "stream", "score")), cycle(THROUGH)
    began = time.monotonic()
    async with aiohttp.ClientSession(connector=limit, timeout=patience) as session:
        for number in range(int(seconds * rate)):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            under_way.append(asyncio.create_task(ask(session, url, next(kinds), number)))
            # None so late that what comes back could not be seen.
            due = (len(kills) + 1) * kill_every
            if due <= time.monotonic() - began and due < seconds - kill_every / 2:
                kills.append(await asyncio.to_thread(kill, next(turns)))
                print(f"{time.monotonic() - began:.0f} s: killed {kills[-1].what}", file=sys.stderr)
        return list(await asyncio.gather(*under_way)), kills


def findings(asked: list[Asked], kills: list[Kill], memory: tuple[float, float]) -> dict[str, Any]:
    """What was lost and whether it had to be; seconds that the answers took."""
    lost = [one for one in asked if one.outcome != "ok"]
    unexcused = [one for one in lost if not any(kill.excuses(one) for kill in kills)]
    for one in unexcused[:20]:
        near = min((abs(one.began - kill.at) for kill in kills), default=0.0)
        print(f"lost: {one.kind}, {one.outcome}, begun {near:.1f} s from the nearest kill", file=sys.stderr)
    took = sorted(one.ended - one.began for one in asked)
    first, last = memory
    return {
        "requests": len(asked),
        "kills": dict(Counter(kill.what for kill in kills)),
        "under_way_at_kills": sum(any(kill.excuses(one) for kill in kills) for one in asked),
        "lost": len(lost),
        "lost_without_excuse": len(unexcused),
        "outcomes": dict(Counter(one.outcome for one in asked)),
        "median_s": round(statistics.median(took), 3),
        "slowest_s": round(took[-1], 1),
        "memory_first_third_gib": round(first, 2),
        "memory_last_third_gib": round(last, 2),
        "memory_growth": round(last / first - 1, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kill-every", type=float, default=3, help="minutes between two kills")
    parser.add_argument("--rate", type=float, default=4, help="requests a second")
    parser.add_argument("--growth", type=float, default=0.1, help="share by which memory may grow")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, up(made_run(Path(place), tiny=True)) as url:
        memory = Memory()
        memory.start()
        asked, kills = asyncio.run(soak(url, 60 * given.minutes, 60 * given.kill_every, given.rate))
        memory.stop_now.set()
        memory.join()
    found = findings(asked, kills, memory.thirds())
    print(json.dumps(found))
    return int(bool(found["lost_without_excuse"] or found["memory_growth"] > given.growth))


if __name__ == "__main__":
    sys.exit(main())
