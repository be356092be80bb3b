"""What stages ask Ray for, how it fits onto nodes, and that a plan leaves no stage out."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from psyray import needs, placement
from psyray.config import Config, load_config
from psyray.needs import homeless, missing, spelt
from psyray.status import expected_stages

ROOT = Path(__file__).parents[2]
GPU = {"GPU": 1, "CPU": 1}


def node(cpus: float, gpus: float = 0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus}


def test_what_fits_lacks_nothing() -> None:
    assert missing([GPU] * 4 + [needs.LIGHT], [node(8), node(2, 2), node(4, 2)]) == ""


@pytest.mark.parametrize(
    ("bundles", "nodes", "expected"),
    [
        ([GPU] * 8, [node(96)], "8 GPU (has 0)"),
        ([GPU] * 8, [node(4, 8)], "8 CPU (has 4)"),
        ([{"CPU": 1}] * 3, [], "3 CPU (has 0)"),
        # Enough in all, but the CPUs are not where the GPUs are.
        ([GPU] * 2, [node(16), node(1, 2)], "a node with 1 GPU + 1 CPU free for 1 of 2 bundles"),
    ],
)
def test_what_lacks_is_named(bundles: list[needs.Bundle], nodes: list[needs.Bundle], expected: str) -> None:
    assert missing(bundles, nodes) == expected


def test_what_others_hold_is_no_room() -> None:
    assert missing([GPU] * 2, [node(8, 4)], {"CPU": 8.0, "GPU": 1.0}) == "2 GPU (has 4, 3 busy)"
    assert missing([GPU] * 2, [node(8, 4)], {"CPU": 8.0}) == "2 GPU (has 4, 4 busy)"
    assert missing([{"CPU": 1}] * 2, [node(2)], {"CPU": 1.9999999999}) == ""


def test_large_bundles_are_placed_before_small_ones() -> None:
    assert homeless([{"CPU": 1}, {"CPU": 2}], [node(1), node(2)]) == []
    assert homeless([{"CPU": 2}] * 2, [node(3)]) == [{"CPU": 2}]


def test_needs_follow_the_settings() -> None:
    config = load_config(None, ["engine.replicas=3", "engine.tensor_parallel=2", "dpo.train.workers=2"])
    assert needs.engine(config.engine, gpu=True) == [{"GPU": 2, "CPU": 1}] * 3 + [needs.LIGHT]
    own = config.engine.model_copy(update={"kwargs": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}})
    assert needs.engine(own, gpu=True)[0] == {"GPU": 8, "CPU": 1} and needs.engine(own, gpu=False)[0] == {"CPU": 8}
    assert needs.scoring(config.engine, gpu=False) == [{"CPU": 1}] * 3 + [needs.LIGHT]
    assert needs.training(config.dpo.train, gpu=True) == [{"GPU": 1}] * 2
    assert needs.forward(gpu=True) == [GPU]
    assert needs.serving(config.engine, True, 0.5) == [{"GPU": 1}] * 2 + [{"CPU": 0.5, "GPU": 0.5}]


def test_bundles_in_words() -> None:
    assert spelt([GPU] * 8 + [needs.LIGHT]) == "8 x (1 GPU + 1 CPU), 0.25 CPU"
    assert spelt([{"GPU": 1}] * 2) == "2 x 1 GPU" and spelt([]) == ""


EVERYTHING = [
    "topics={engine: http, url: http://127.0.0.1:9/v1, model: m}",
    "speeches.sources=[{name: a, path: a.jsonl, use: pairs}]",
    "evaluate.second={engine: vllm, model: m}",
    "reward.adapters.count=2",
    "loop.rounds=2",
]


def test_a_plan_places_every_stage_of_a_run() -> None:
    config = load_config(None, EVERYTHING)
    placed = {place.stage for place in placement.places(config, gpu=True)}
    expected = {
        "round-N/" + name.partition("/")[2] if "/" in name else name for name in expected_stages(dumped(config))
    }
    assert placed == expected | {"served"}


def dumped(config: Config) -> dict[str, object]:
    return config.model_dump(mode="json")


def test_a_pool_and_a_panel_have_a_line_for_each_place() -> None:
    config = load_config(
        None,
        [
            "responses.responders=[{name: a, model: m/a}, {name: b, model: m/b, engine: {tensor_parallel: 2}},"
            " {name: c, model: m, endpoint: {url: http://127.0.0.1:9/v1}}, {name: d, model: m/a}]",
            "panel.judges=[{engine: rule}, {engine: vllm, model: m/j}]",
            "oracle.kind=experts",
            "oracle.fall_back=judge",
        ],
    )
    places = list(placement.places(config, gpu=True))
    pool = [(place.who, spelt(place.bundles)) for place in places if place.stage == "responses"]
    assert pool == [
        ("1 engine of m/a", "1 GPU + 1 CPU, 0.25 CPU"),
        ("1 engine of m/b", "2 GPU + 1 CPU, 0.25 CPU"),
        ("one that asks http://127.0.0.1:9/v1", "0.25 CPU"),
    ]
    assert [p.who for p in places if p.stage == "judgements"] == ["the rule", "1 engine of m/j"]
    who = [place.who for place in places if place.stage == "round-N/labels"]
    assert who == ["experts, at their page", "the rule", "1 engine of m/j"]


def shown(config: Config) -> str:
    out = StringIO()
    placement.show_places(config, Console(file=out, width=200))
    return out.getvalue()


def test_a_plan_says_what_the_cluster_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "at_hand", lambda config: ([node(8), node(8, 4)], "two nodes"))
    text = shown(load_config(ROOT / "configs/psychocounsel-8b.yaml"))
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 3}
    assert "lacks 8 GPU (has 4)" in lines["round-N/policy"] and "8 x (1 GPU + 1 CPU)" in lines["round-N/samples"]
    assert "yes" in lines["pairs"] and "yes" in lines["judgements"] and "yes" in lines["served"]
    assert "cluster: two nodes" in text and "waits 1800 s (cluster.wait_s)" in text


def test_a_plan_for_this_machine_fits_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    text = shown(load_config(ROOT / "configs/demo.yaml"))
    assert "lacks" not in text and "would be started on this machine" in text


def test_a_dashboards_address_is_no_cluster_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert "submit the dry run as a job" in shown(Config())
