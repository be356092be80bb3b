"""What the soak counts as lost: only what was under way through the killed replica is excused."""

from __future__ import annotations

import pytest
import soak


def test_only_what_was_under_way_through_the_killed_replica_is_excused() -> None:
    kills = [soak.Kill("policy", 10.0, 10.1), soak.Kill("Keeper", 20.0, 20.1)]
    asked = [
        soak.Asked("chat", 9.0, 10.5, "503"),  # in the engine that died
        soak.Asked("chat", 9.0, 11.0, "ok"),
        soak.Asked("score", 9.0, 10.5, "503"),  # not through the engine
        soak.Asked("chat", 10.2, 40.0, "503"),  # begun after it was gone
        soak.Asked("stream", 19.0, 20.5, "cut off"),  # the keeper carries no request
    ]
    found = soak.findings(asked, kills, (2.0, 2.1))
    assert (found["requests"], found["lost"], found["lost_without_excuse"]) == (5, 4, 3)
    assert found["under_way_at_kills"] == 2 and found["memory_growth"] == pytest.approx(0.05)


def test_memory_is_compared_between_thirds_without_the_start() -> None:
    memory = soak.Memory()
    memory.samples = [(at, soak.GIB * (9 if at < 60 else 2 if at <= 300 else 3)) for at in range(5, 901, 5)]
    assert memory.thirds() == (2.0, 3.0)
