"""Where the time of a round goes."""

from pathlib import Path

import pytest

from psyray.data.generate import EngineStart
from psyray.run import Artifact
from psyray.times import PART_OF, PARTS, by_round, spent


def stage(name: str, seconds: float, **stats: float) -> Artifact:
    return Artifact(name, Path(), name, {"seconds": seconds, "stats": stats})


def test_every_stage_of_a_round_counts_once_and_the_engines_start_apart():
    stages = [
        stage("speeches", 5), stage("round-0/samples", 50, engine_start_s=30), stage("round-0/gate", 1),
        stage("round-1/labels", 2), stage("round-1/heads", 3), stage("round-1/policy", 100),
        stage("round-1/samples", 60, engine_start_s=41.5), stage("round-1/features", 20), stage("round-1/scores", 1),
        stage("round-1/probe", 8), stage("round-1/second", 4), stage("round-1/gate", 2),
        stage("round-1/samples-again", 30, engine_start_s=20), stage("round-1/features-again", 10),
    ]  # fmt: skip
    found = by_round(stages)
    assert found[0] == {"engine start": 30, "sampling": 20, "evaluation": 1}
    assert found[1] == {
        "engine start": 61.5, "sampling": 28.5, "scoring": 31, "labels": 2, "training": 103, "evaluation": 14,
    }  # fmt: skip
    assert list(found[1]) == list(PARTS) and set(PART_OF.values()) | {"engine start"} == set(PARTS)
    assert sum(sum(parts.values()) for parts in found.values()) == pytest.approx(
        sum(s.manifest["seconds"] for s in stages[1:])
    )
    assert spent(stages[0]) is None


def test_an_engine_has_started_when_its_first_answers_are_in_less_their_own_time(monkeypatch):
    now = iter([100.0, 145.0, 300.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    begun = EngineStart()
    begun.note([{"seconds": None}, {}])
    begun.note([{"seconds": -1}])  # what an engine says of a row that failed
    begun.note([{"seconds": 2.0}, {"seconds": 5.0}, {"seconds": None}])
    begun.note([{"seconds": 1.0}])
    assert begun.seconds == 40.0
