"""Rates, money and rests, on a clock that the test turns."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate

import pytest

from psyray.engines.pace import NO_MONEY, Bucket, Halted, Pace, Purse, backoff, retry_after


class Clock:
    """A clock that stands until it is turned."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_no_window_of_a_minute_sees_more_than_its_share():
    clock = Clock()
    bucket, sent = Bucket(120, clock), []
    while clock.now < 400:
        if bucket.wait(1) == 0:
            bucket.take(1)
            sent.append(clock.now)
        clock.now += 0.05
    windows = [sum(start <= at < start + 60 for at in sent) for start in sent]
    assert max(windows) <= 122 and len(sent) >= 0.97 * 120 * 5


def test_tokens_that_were_not_used_come_back_and_a_debt_is_waited_for():
    clock = Clock()
    bucket = Bucket(6000, clock)  # 100 a second
    assert bucket.wait(500) == 0
    bucket.take(500)
    assert bucket.wait(100) == pytest.approx(5.0)
    bucket.take(-300)
    assert bucket.wait(100) == pytest.approx(2.0)
    clock.now += 2
    assert bucket.wait(100) == pytest.approx(0)
    assert Bucket(None, clock).wait(1e9) == 0


def test_retry_after_is_read_as_seconds_and_as_a_date():
    server = datetime(2020, 1, 1, tzinfo=UTC)  # its clock is years off
    dated = {"Retry-After": format_datetime(server + timedelta(seconds=90), usegmt=True),
             "Date": format_datetime(server, usegmt=True)}  # fmt: skip
    assert retry_after(dated) == 90.0
    assert retry_after({"Retry-After": formatdate(0)}) == 0.0
    assert retry_after({"Retry-After": " 7 "}) == 7.0 and retry_after({"Retry-After": "1.5"}) == 1.5
    for nothing in ({}, {"Retry-After": "soon"}, {"Retry-After": "inf"}, {"Retry-After": "nan"}):
        assert retry_after(nothing) is None
    assert retry_after({"Retry-After": "-3"}) == 0.0


def test_a_rest_is_what_was_asked_for_or_full_jitter():
    highest = [backoff(n, None, lambda low, high: high) for n in range(1, 9)]
    assert highest == [2, 4, 8, 16, 32, 60, 60, 60] and backoff(3, None, lambda low, high: low) == 0
    assert backoff(1, 5.0, lambda low, high: low) == 5.0 and 5.0 <= backoff(1, 5.0) <= 6.0


def test_busy_closes_the_line_for_all_and_halves_what_may_be_under_way_once():
    async def play() -> None:
        clock = Clock()
        pace = Pace(16, Purse(None), clock=clock)
        for _ in range(16):
            await pace.turn(1, 0)
        clock.now += 1
        for _ in range(16):  # all of one wave
            pace.busy(5.0, sent_at=100.0)
            pace.done(1, 1, 0, 0)
        assert pace.allowed == 8 and pace._wait(1, 0) == pytest.approx(5.0)
        clock.now += 5
        assert pace._wait(1, 0) == 0
        for _ in range(8):
            await pace.turn(1, 0)
        assert pace._wait(1, 0) == float("inf")
        for _ in range(200):
            pace.good()
        assert pace.allowed == 16

    asyncio.run(play())


def test_money_is_held_for_requests_under_way_and_never_overspent():
    async def play() -> None:
        purse = Purse(1.0, spent=0.35)
        pace = Pace(8, purse)
        await pace.turn(1, 0.3)
        await pace.turn(1, 0.3)
        third = asyncio.create_task(pace.turn(1, 0.3))
        await asyncio.sleep(0.01)
        assert not third.done()  # 0.95 are spent or held
        pace.done(1, None, 0.3, 0.05)
        await third  # 0.4 spent, 0.6 held
        fourth = asyncio.create_task(pace.turn(1, 0.3))
        pace.done(1, None, 0.3, 0.3)
        await asyncio.sleep(0.01)
        assert not fourth.done()
        pace.done(1, None, 0.3, 0.3)
        with pytest.raises(Halted):
            await fourth
        assert pace.why == NO_MONEY and purse.spent == pytest.approx(1.0)
        await pace.idle()

    asyncio.run(play())
