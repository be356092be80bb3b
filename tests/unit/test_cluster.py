"""The Ray session, where Ray does not do what it is asked."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import ray
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR

from psyray import cluster
from psyray.cluster import ray_session, require
from psyray.config import Config, load_config
from psyray.errors import PsyrayError
from psyray.needs import engine, missing
from psyray.sections.data import EngineSection


def test_a_ray_that_does_not_start_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**settings: Any) -> NoReturn:
        assert settings["address"] == "local"
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with (
        pytest.raises(PsyrayError, match="did not start on this machine: The current node timed out"),
        ray_session(Config()),
    ):
        pass


def test_only_a_cluster_has_its_training_jobs_look_out_for_nodes_that_are_taken_away(monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv(ENABLE_PREEMPTION_WATCHER_ENV_VAR, raising=False)
    started = SimpleNamespace(init=lambda **_: None)
    cluster._start(started, Config(), "auto")
    assert ENABLE_PREEMPTION_WATCHER_ENV_VAR not in os.environ
    cluster._start(started, Config(), None)
    assert os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] == "0"


@pytest.mark.parametrize(("allowed", "gpus"), [(None, 8), ("2,3", 2), ("", 0)])
def test_a_ray_of_this_machine_has_room_for_an_engine_on_each_gpu_that_may_be_used(
    allowed: str | None, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "Path", lambda _: SimpleNamespace(glob=lambda _: ["a device"] * 8))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if allowed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    [here], _ = cluster.at_hand(Config())
    assert here == {"CPU": 4 + gpus, "GPU": gpus}
    if gpus:
        assert not missing(engine(EngineSection(replicas=gpus), gpu=True), [here])


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:9", "no Ray at 127.0.0.1:9: .*refused; start one"), ("http://h:8265", "jobs only: `ray job submit")],
)
def test_an_address_where_no_ray_listens_is_an_error_at_once(
    address: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    # Ray itself would go on trying for minutes.
    with pytest.raises(PsyrayError, match=expected), ray_session(load_config(None, [f"cluster.address={address}"])):
        pass


def test_a_stage_that_waits_for_room_says_within_a_minute_what_is_lacking_and_goes_on_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, said, asked = [0.0], list[tuple[float, str]](), list[Any]()

    def sleep(seconds: float) -> None:
        now[0] += seconds

    one_gpu_comes_at = 1000.0
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(cluster, "nodes", lambda: [{"CPU": 8.0, "GPU": float(now[0] >= one_gpu_comes_at)}])
    monkeypatch.setattr(ray, "available_resources", lambda: cluster.nodes()[0])
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    require([{"GPU": 1, "CPU": 1}], 1800, "the policy", lambda line: said.append((now[0], line)))
    assert one_gpu_comes_at <= now[0] < one_gpu_comes_at + 1 and asked == [[{"GPU": 1, "CPU": 1}], []]
    assert [round(at) for at, _ in said] == [30, 330, 630, 930]
    assert "the policy waits for room: the cluster lacks 1 GPU (has 0) after 30 s; it stops after 1800 s" in said[0][1]

    one_gpu_comes_at, now[0] = 1e9, 0.0
    with pytest.raises(PsyrayError, match=r"the policy cannot be placed: the cluster lacks 1 GPU \(has 0\) after 60 s"):
        require([{"GPU": 1, "CPU": 1}], 60, "the policy", lambda line: said.append((now[0], line)))
    assert len(said) == 5
