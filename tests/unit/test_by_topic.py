"""Accuracy of the heads by topic: by hand, and as the stage that nothing is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from made_stage import made_stage

from psyray.data.topics import TOPICS
from psyray.in_words import key_numbers
from psyray.records import PAIRS, SPEECHES
from psyray.reward.by_topic import by_topic, by_topic_stage
from psyray.reward.ensemble import FEATURES
from psyray.reward.heads import Heads
from psyray.run import Folder, Run


def pair(speech: str, **more: Any) -> dict[str, Any]:
    return {"speech_id": speech, "chosen": "x" * 9, "rejected": "x" * 5, **more}


def test_largest_topics_first_and_the_rest_as_one() -> None:
    margins = np.array([1.0, -1.0, 0.0, 2.0, 3.0, -2.0])
    topics = ["grief", "work", "work", "none", "work", "sleep"]
    found = by_topic(margins, [pair(str(n)) for n in range(6)], topics, most=2)["topic"]
    assert {name: (part["pairs"], part["accuracy"]) for name, part in found.items()} == {
        "work": (3, 0.5),  # one right, one wrong, a tie
        "grief": (1, 1.0),  # of equally many the first by name
        "others": (2, 0.5),
    }
    assert list(found) == ["work", "grief", "others"] and found["work"]["length_accuracy"] == 1.0


def test_pairs_without_a_topic_are_a_part_unless_none_has_one() -> None:
    margins, pairs = np.array([1.0, -1.0]), [pair("a"), pair("b")]
    assert list(by_topic(margins, pairs, ["none", "grief"])["topic"]) == ["grief", "none"]
    assert by_topic(margins, pairs, ["none", "none"]) == {} == by_topic(margins[:0], [], [])


def test_stage_reads_topics_from_either_table_and_only_held_out_labels_count(tmp_path: Path) -> None:
    # Held out are s0, ranked right, and s1, ranked wrong; s2 is a training pair, r0 is labelled by the reward model.
    right = {"s0": 1.0, "s1": -1.0, "s2": -1.0, "r0": -1.0}
    known = [
        {"response_id": f"{key}{side}", "features": [sign * value]}
        for key, value in right.items()
        for side, sign in (("a", 1.0), ("b", -1.0))
    ]
    pairs = [
        pair(
            "s0" if key == "r0" else key, pair_id=key, chosen_id=f"{key}a", rejected_id=f"{key}b",
            split="train" if key == "s2" else "test", source="reward" if key == "r0" else "judge",
        )
        for key in right
    ]  # fmt: skip
    said = [{"speech_id": "s0", "topic": "grief"}, {"speech_id": "s1", "topic": ""}]
    picked = [{"speech_id": "s0", "topic": "grief"}, {"speech_id": "s1", "topic": None}]
    run = Run(tmp_path / "run", say=lambda line: None)
    with run.open({}):
        heads = run.stage("reward-heads", {}, [], one_head)
        features = made_stage(run, "reward-features", FEATURES, "response_id", known)
        labelled = made_stage(run, "pairs", PAIRS, "pair_id", pairs)
        speeches = made_stage(run, "speeches", SPEECHES, "speech_id", said)
        topics = made_stage(run, "topics", TOPICS, "speech_id", picked)
        first, second = (by_topic_stage(run, heads, [features], [labelled], source) for source in (speeches, topics))
    for stage in (first, second):
        parts = {name: (part["pairs"], part["accuracy"]) for name, part in stage.stats["strata"]["topic"].items()}
        assert parts == {"grief": (1, 1.0), "none": (1, 0.0)}
    assert first.fingerprint != second.fingerprint
    assert key_numbers("reward-topics", first.stats) == "accuracy 0.0 % (none) to 100.0 % (grief)"
    assert key_numbers("reward-topics", {"strata": {}}) == "no topics"


def one_head(folder: Folder) -> dict[str, Any]:
    Heads(np.ones((1, 1)), np.zeros(1), np.ones(1)).save(folder.path / "heads.npz")
    return {}
