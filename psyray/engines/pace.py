"""How fast an endpoint may be asked: concurrency, requests and tokens a minute, money, and what it says itself."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_BACKOFF_S = 60.0
NO_MONEY = "no money for a further request"
Clock = Callable[[], float]


class Halted(Exception):
    """No more requests go out."""


class Bucket:
    """A token bucket that refills at `per_minute`; it holds a second's worth, so that no minute sees a burst.

    What is larger than the bucket may be taken when it is full; the next taker waits for the debt. None: no limit.
    """

    def __init__(self, per_minute: float | None, clock: Clock = time.monotonic) -> None:
        self.rate = math.inf if per_minute is None else per_minute / 60
        self.room = max(1.0, self.rate)
        self._level, self._at, self._clock = self.room, clock(), clock

    def wait(self, amount: float) -> float:
        """Seconds until `amount` may be taken."""
        if math.isinf(self.rate):
            return 0.0
        now = self._clock()
        self._level, self._at = min(self.room, self._level + (now - self._at) * self.rate), now
        return max(0.0, (min(amount, self.room) - self._level) / self.rate)

    def take(self, amount: float) -> None:
        """Take it, be it into debt; a negative amount gives back what was taken too much."""
        self._level -= amount


class Purse:
    """Money: what was spent, what requests under way may cost at most, and the ceiling; None is no ceiling."""

    def __init__(self, ceiling: float | None, spent: float = 0.0) -> None:
        self.ceiling, self.spent, self.held = ceiling, spent, 0.0

    def affords(self, cost: float) -> bool:
        """Whether `cost` fits beside all that is held."""
        return self.ceiling is None or self.spent + self.held + cost <= self.ceiling

    def hold(self, cost: float) -> None:
        """Keep `cost` back for a request that goes out."""
        self.held += cost

    def settle(self, held: float, cost: float) -> None:
        """The request is back: it held `held` and has cost `cost`."""
        self.held, self.spent = self.held - held, self.spent + cost


class Pace:
    """The one line in which every request waits for its turn; first come, first served.

    An endpoint that answers `busy` closes the line for all and halves the number of requests that may be under way;
    good answers raise it again, by a twentieth of the whole in the time of one request.
    """

    def __init__(
        self,
        concurrency: int,
        purse: Purse,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.most, self.allowed, self.under_way = concurrency, float(concurrency), 0
        self.purse, self.clock = purse, clock
        self.requests, self.tokens = Bucket(requests_per_minute, clock), Bucket(tokens_per_minute, clock)
        self.closed_until = self.cut_at = -math.inf
        self.halted, self.why = asyncio.Event(), ""
        self._line, self._changed = asyncio.Lock(), asyncio.Event()

    async def turn(self, tokens: float, cost: float) -> None:
        """Wait until a request of so many tokens and at most this cost may go out; Halted if none may any more."""
        async with self._line:
            while (wait := self._wait(tokens, cost)) > 0:
                self._changed.clear()
                if wait == math.inf:
                    await self._changed.wait()
                else:
                    await pause(self._changed, wait)
            self.under_way += 1
            self.requests.take(1)
            self.tokens.take(tokens)
            self.purse.hold(cost)

    def _wait(self, tokens: float, cost: float) -> float:
        """Seconds until the next look; infinite where only a request that comes back can change anything."""
        if self.halted.is_set():
            raise Halted
        if not self.purse.affords(cost):
            if not self.under_way:
                self.halt(NO_MONEY)
                raise Halted
            return math.inf
        if self.under_way >= max(1, int(self.allowed)):
            return math.inf
        return max(self.closed_until - self.clock(), self.requests.wait(1), self.tokens.wait(tokens))

    def done(self, estimated: float, used: float | None, held: float, cost: float) -> None:
        """A request is back: correct the tokens that were estimated and the money that was held."""
        self.under_way -= 1
        if used is not None:
            self.tokens.take(used - estimated)
        self.purse.settle(held, cost)
        self._changed.set()

    def good(self) -> None:
        """The endpoint keeps up."""
        self.allowed = min(self.most, self.allowed + max(1.0, self.most / 20) / self.allowed)

    def busy(self, wait_s: float, sent_at: float) -> None:
        """The endpoint wants less: nothing goes out for `wait_s` seconds, and then half as much at once.

        Answers to requests that went out before the last cut do not cut again.
        """
        now = self.clock()
        self.closed_until = max(self.closed_until, now + wait_s)
        if sent_at > self.cut_at:
            self.allowed, self.cut_at = max(1.0, self.allowed / 2), now

    def halt(self, why: str) -> None:
        """Let no further request go out; the first reason counts."""
        self.why = self.why or why
        self.halted.set()
        self._changed.set()

    async def idle(self) -> None:
        """Wait until no request is under way; meant for a line that is halted."""
        while self.under_way:
            await asyncio.sleep(0.02)


async def pause(event: asyncio.Event, seconds: float) -> None:
    """Sleep, or wake as soon as the event is set."""
    with suppress(TimeoutError):  # slept to the end
        await asyncio.wait_for(event.wait(), seconds)


def backoff(attempt: int, asked_s: float | None, jitter: Callable[[float, float], float] = random.uniform) -> float:
    """Seconds before the next try: what the endpoint asked for and up to a second more, else full jitter."""
    if asked_s is not None:
        return asked_s + jitter(0.0, 1.0)
    return jitter(0.0, min(2.0**attempt, LONGEST_BACKOFF_S))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply's Retry-After asks for, given as seconds or as a date; None where it asks for nothing.

    A date is read against the reply's own Date, so that a clock that is off does no harm.
    """
    given = headers.get("Retry-After", "").strip()
    try:
        seconds = float(given)
    except ValueError:
        when, now = _date(given), _date(headers.get("Date", "")) or datetime.now(UTC)
        seconds = math.nan if when is None else (when - now).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _date(text: str) -> datetime | None:
    try:
        when = parsedate_to_datetime(text)
    except ValueError:  # no date
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)
