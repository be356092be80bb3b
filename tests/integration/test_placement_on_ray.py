"""A stage that finds no room says so in time and names what is missing, whatever kind of stage it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psyray.cluster import at_hand, nodes, require
from psyray.config import Config, load_config
from psyray.engines import vllm
from psyray.errors import PsyrayError
from psyray.evaluate.likelihood import likelihoods
from psyray.pipeline import served_stage
from psyray.reward.body import Reading
from psyray.reward.score import FeatureActor, ScoreActor, on_actors
from psyray.run import Artifact, Folder, Run
from psyray.train import run_training

WAIT_S = 1.0
CONFIG = load_config(None, ["engine.device=gpu", f"cluster.wait_s={WAIT_S}", "dpo.train.workers=2"])


def train(path: Path) -> Any:
    section = CONFIG.dpo.train
    return run_training(Folder(path), print, [{}], {}, section, CONFIG.engine, CONFIG.cluster, title="the policy")


def serve(path: Path) -> Any:
    run = Run(path, lambda line: None)
    return served_stage(run, Artifact("export", path, "0", {}), CONFIG)


STAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "engine": (lambda path: vllm.generate(None, "m", CONFIG.engine, WAIT_S), "the engine for m"),
    "features": (lambda path: on_actors(FeatureActor, None, CONFIG, path, Reading()), "the reward model in"),
    "scoring": (lambda path: on_actors(ScoreActor, None, CONFIG, path, None), "the reward model in"),
    "trainer": (train, "the policy"),
    "probe": (lambda path: likelihoods([("m", [])], CONFIG, title="the probe"), "the probe"),
    "serve": (serve, "the served result"),
}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_without_room_names_what_is_missing_and_does_not_hang(kind: str, tmp_path: Path) -> None:
    start, what = STAGES[kind]
    began = time.monotonic()
    with pytest.raises(PsyrayError, match=rf"{what}.* cannot be placed: the cluster lacks \d GPU \(has 0\) after 1 s"):
        start(tmp_path)
    assert time.monotonic() - began < WAIT_S + 10


@pytest.mark.usefixtures("ray_cluster")
def test_what_others_hold_is_waited_for() -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    [node] = nodes()
    every = [{"CPU": 1}] * int(node["CPU"])
    held = placement_group(every)
    assert held.wait(60)
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0):  # what Ray says of its nodes follows a moment later
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(PsyrayError, match=rf"lacks 1 CPU \(has {len(every)}, {len(every)} busy\)"):
        require([{"CPU": 1}], WAIT_S, "a stage")

    letting_go = threading.Timer(1, remove_placement_group, [held])
    letting_go.start()
    require(every, 60, "a stage")
    letting_go.join()


@pytest.mark.usefixtures("ray_cluster")
def test_a_plan_sees_the_nodes_of_the_cluster_that_it_is_attached_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    found, where = at_hand(Config())
    assert found == nodes() and where == "the Ray at auto, 1 nodes"
