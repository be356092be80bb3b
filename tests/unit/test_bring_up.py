"""Waiting for a part to come up, without Ray: what is told of one that finds no room."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from serve import bring_up

UNPLACED = "Deployment 'RewardServer' has 1 replicas that have taken more than 30s to be scheduled."


def application(state: str, message: str = "") -> Any:
    """A stand-in for Serve's account of an application of one deployment."""
    health = "HEALTHY" if state == "RUNNING" else "UPDATING"
    part = SimpleNamespace(status=SimpleNamespace(value=health), message=message)
    return SimpleNamespace(status=SimpleNamespace(value=state), message="", deployments={"RewardServer": part})


def states(monkeypatch: pytest.MonkeyPatch, *found: Any) -> list[str]:
    """Let Serve answer these in turn; what the log says."""
    answers, lines = iter(found), list[str]()
    monkeypatch.setattr(bring_up, "_POLL_S", 0.0)
    monkeypatch.setattr(
        bring_up.serve, "status", lambda: SimpleNamespace(applications={"psyray.reward": next(answers)})
    )
    monkeypatch.setattr(bring_up.ray, "cluster_resources", lambda: {"CPU": 2.0, "memory": 9e9})
    monkeypatch.setattr(bring_up.ray, "available_resources", lambda: {"memory": 9e9})
    monkeypatch.setattr(bring_up.logger, "warning", lambda form, *words: lines.append(form % words))
    return lines


def test_a_part_without_room_is_told_once_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = application("DEPLOYING", UNPLACED)
    lines = states(monkeypatch, application("DEPLOYING"), waiting, waiting, application("RUNNING"))
    bring_up.wait_until_running("psyray.reward", 60)
    (line,) = lines
    assert "psyray.reward waits for room: the cluster has 2 CPU (0 free)" in line
    assert "reward=false" in line


def test_a_part_that_only_starts_slowly_is_not_said_to_lack_room(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = application("DEPLOYING", "1 replicas that have taken more than 30s to initialize.")
    lines = states(monkeypatch, slow, slow, application("RUNNING"))
    bring_up.wait_until_running("psyray.reward", 60)
    assert not lines


def test_a_part_that_never_finds_room_is_given_up_with_serves_words(monkeypatch: pytest.MonkeyPatch) -> None:
    states(monkeypatch, application("DEPLOYING", UNPLACED))
    with pytest.raises(RuntimeError, match=r"not up after -1 s: .*RewardServer.*to be scheduled"):
        bring_up.wait_until_running("psyray.reward", -1)
