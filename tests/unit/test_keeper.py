"""The keeper without Ray: when it changes over, what it refuses, and what it takes away."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from psyray.errors import PsyrayError
from serve import keeper
from serve.champion import Args, Policy
from serve.lineup import Lineup, Part, Served


def named(name: str) -> Lineup:
    """A line-up of one policy on one engine."""
    policy = Policy(name=name, path=name, round=1)
    return Lineup((Served(policy, name, f"psyray.policy.{name}", "base"),), None, (Part(f"psyray.policy.{name}"),))


@dataclass
class MadeOrder:
    """A stand-in for files and registry: what each look finds, in turn, the last again and again."""

    finds: list[Lineup | Exception]
    asked: Args

    def read(self, owner: str) -> Lineup:
        found = self.finds.pop(0) if len(self.finds) > 1 else self.finds[0]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A stand-in for Serve: applications that are up, those that will not come up, and what was tried."""
    made = SimpleNamespace(up=["psyray", "other.policy.x", "psyray.policy.left-over"], broken=set(), tried=[])

    async def in_a_worker(parts: Any) -> None:
        for part in parts:
            made.tried.append(part.app)
            if part.app in made.broken:
                raise RayError("no weights")
            made.up = [*dict.fromkeys([*made.up, part.app])]

    monkeypatch.setattr(keeper, "in_a_worker", in_a_worker)
    monkeypatch.setattr(keeper, "LINGER_S", 0.01)
    monkeypatch.setattr(keeper, "Gauge", lambda *a, **k: SimpleNamespace(set=lambda value: None))
    monkeypatch.setattr(keeper.serve, "get_replica_context", lambda: SimpleNamespace(app_name="psyray"))
    status = SimpleNamespace(status=SimpleNamespace(value="RUNNING"))
    monkeypatch.setattr(keeper.serve, "status", lambda: SimpleNamespace(applications=dict.fromkeys(made.up, status)))
    monkeypatch.setattr(keeper.serve, "delete", lambda app, _blocking: made.up.remove(app))
    yield made
    gc.collect()  # a keeper that a caught error still holds would ask the real Serve later, which starts Ray


def watched(finds: list[Lineup | PsyrayError], looks: int) -> tuple[keeper.Keeper, list[Lineup | None]]:
    """A keeper after so many looks, and what answered after each."""

    async def run() -> tuple[keeper.Keeper, list[Lineup | None]]:
        kept = object.__new__(keeper.Keeper)
        await kept.__init__(MadeOrder(finds, Args(follow_s=3600)))  # type: ignore[misc, arg-type]
        kept._watching.cancel()
        seen = []
        for _ in range(looks):
            await kept._look()
            seen.append(kept.now)
        return kept, seen

    return asyncio.run(run())


def test_a_new_champion_comes_up_before_the_old_one_goes(cluster: SimpleNamespace) -> None:
    _, seen = watched([named("a"), named("a"), named("b")], 3)
    assert seen == [named("a"), named("a"), named("b")]
    assert cluster.tried == ["psyray.policy.a", "psyray.policy.b"]
    # What another application has, and the application itself, stay.
    assert cluster.up == ["psyray", "other.policy.x", "psyray.policy.b"]


def test_one_that_does_not_come_up_is_refused_once_and_the_old_one_answers_on(cluster: SimpleNamespace) -> None:
    cluster.broken.add("psyray.policy.b")
    kept, seen = watched([named("a"), named("b"), named("b"), named("c")], 4)
    assert seen == [named("a"), named("a"), named("a"), named("c")] and kept.trouble == ""
    assert cluster.tried == ["psyray.policy.a", "psyray.policy.b", "psyray.policy.c"]


def test_a_registry_out_of_reach_changes_nothing(cluster: SimpleNamespace) -> None:
    kept, seen = watched([named("a"), PsyrayError("no registry")], 2)
    assert seen == [named("a")] * 2 and kept.trouble == "no registry" and "psyray.policy.a" in cluster.up


def test_whoever_asks_before_there_is_one_is_told_why(cluster: SimpleNamespace) -> None:
    async def run() -> None:
        kept = object.__new__(keeper.Keeper)
        await kept.__init__(MadeOrder([PsyrayError("no champion yet")], Args(follow_s=3600)))  # type: ignore[misc, arg-type]
        with pytest.raises(RuntimeError, match="no champion yet"):
            await kept.lineup()

    asyncio.run(run())
    assert cluster.tried == []


def test_the_watch_outlives_what_nobody_foresaw(cluster: SimpleNamespace) -> None:
    async def run() -> tuple[str, Lineup, str]:
        kept = object.__new__(keeper.Keeper)
        asked = Args(follow_s=3600).model_copy(update={"follow_s": 0.01})
        finds = [OSError("stale file handle"), ValueError("no YAML"), named("a")]
        await kept.__init__(MadeOrder(finds, asked))  # type: ignore[misc, arg-type]
        with pytest.raises(RuntimeError) as caught:  # and does not wait for ever
            await asyncio.wait_for(kept.lineup(), 20)
        async with asyncio.timeout(20):
            while kept.now is None:
                await asyncio.sleep(0.01)
        kept._watching.cancel()
        return str(caught.value), await kept.lineup(), kept.trouble

    assert asyncio.run(run()) == ("looking for the champion failed: OSError: stale file handle", named("a"), "")


def test_a_refused_one_is_tried_again_after_a_while(cluster: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.broken.add("psyray.policy.a")
    monkeypatch.setattr(keeper, "AGAIN_S", -1.0)
    kept, seen = watched([named("a")], 2)
    assert seen == [None, None] and cluster.tried == ["psyray.policy.a"] * 2 and "no weights" in kept.trouble


def test_a_deleted_application_takes_its_parts_along(cluster: SimpleNamespace) -> None:
    replaced, _ = watched([named("a")], 1)
    replaced.__del__()
    assert "psyray.policy.a" in cluster.up
    kept, _ = watched([named("a")], 1)
    cluster.up.remove("psyray")
    kept.__del__()
    assert cluster.up == ["other.policy.x"]
    cluster.up.append("psyray.policy.b")
    kept.__del__()
    assert "psyray.policy.b" in cluster.up  # Python calls it once more


def test_the_parts_stay_until_the_port_has_given_its_answers(
    cluster: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that picks the best of several answers asks the reward model last."""
    kept, _ = watched([named("a")], 1)
    port, seen = SimpleNamespace(replica_states={"STOPPING": 1}), []
    deleted = SimpleNamespace(status=SimpleNamespace(value="DELETING"), deployments={"Ingress": port})
    monkeypatch.setattr(
        keeper.serve, "status", lambda: SimpleNamespace(applications=dict.fromkeys(cluster.up, deleted))
    )

    def sleep(seconds: float) -> None:
        seen.append(list(cluster.up))
        port.replica_states = {}

    monkeypatch.setattr(keeper.time, "sleep", sleep)
    kept.__del__()
    assert len(seen) == 1 and "psyray.policy.a" in seen[0] and "psyray.policy.a" not in cluster.up
