"""Heads on held-out pairs: parts by hand, and a spread that tells errors beside one that does not."""

from __future__ import annotations

import numpy as np
import pytest

from psyray.reward.held_out import doubt, held_out, strata
from psyray.reward.uncertainty import Belief


def of_heads(margins_NH: np.ndarray) -> Belief:
    """What heads with these margins believe."""
    return Belief(margins_NH.mean(axis=1), margins_NH.std(axis=1))


def pair(speech: str, chosen: int, rejected: int, margin: float | None = 1.0, source: str = "judge") -> dict:
    """A pair of texts of so many characters."""
    return {"speech_id": speech, "chosen": "x" * chosen, "rejected": "x" * rejected, "margin": margin, "source": source}


def test_parts_by_hand() -> None:
    pairs = [
        pair("a", 100, 50, 2.0),
        pair("a", 100, 60, 1.0),
        pair("b", 100, 98, 4.0, "oracle"),
        pair("c", 50, 100, None, "oracle"),
    ]
    found = strata(np.array([1.0, -1.0, 0.0, 3.0]), pairs)
    assert {k: (v["pairs"], v["accuracy"], v["length_accuracy"]) for k, v in found["length"].items()} == {
        "chosen longer": (2, 0.5, 1.0),
        "alike": (1, 0.5, 1.0),
        "chosen shorter": (1, 1.0, 0.0),
    }
    assert {k: (v["pairs"], v["accuracy"]) for k, v in found["label margin"].items()} == {
        "wide": (1, 0.5),  # the median of 1, 2, 4 is 2: above it stands 4
        "narrow": (2, 0.5),
    }
    assert {k: (v["pairs"], v["accuracy"]) for k, v in found["labelled by"].items()} == {
        "judge": (2, 0.5),
        "oracle": (2, 0.75),
    }


def test_every_way_of_parting_leaves_no_pair_out() -> None:
    rng = np.random.default_rng(0)
    pairs = [pair(f"s{n % 7}", *rng.integers(1, 90, 2), margin=float(rng.normal())) for n in range(60)]
    for parts in strata(rng.normal(size=60), pairs).values():
        assert sum(part["pairs"] for part in parts.values()) == 60


def test_labels_without_a_margin_are_in_no_half() -> None:
    assert strata(np.array([1.0]), [pair("a", 5, 9, None)])["label margin"] == {}


def test_doubt_by_hand() -> None:
    # Margins 2, 1, -1, 0 with spreads 0, 1, 3, 2: both wrong ones (a tie is wrong) have more than both right ones.
    heads = np.array([[2.0, 2.0], [0.0, 2.0], [-4.0, 2.0], [-2.0, 2.0]])
    found = doubt(of_heads(heads), ["a", "b", "c", "d"])
    assert found["wrong"] == 2
    assert found["tells_errors"]["spread"]["value"] == 1.0
    assert found["tells_errors"]["closeness"]["value"] == (1 + 0.5 + 1 + 1) / 4
    assert [(g["spread"], g["margin"], g["error"], g["n"]) for g in found["groups"]] == [
        (0.0, 2.0, 0.0, 1), (1.0, 1.0, 0.0, 1), (2.0, 0.0, 1.0, 1), (3.0, 1.0, 1.0, 1),
    ]  # fmt: skip


def test_a_spread_that_follows_the_error_is_told_from_one_that_does_not() -> None:
    rng = np.random.default_rng(1)
    hard_N = rng.random(600) < 0.5
    margins_N = np.where(rng.random(600) < np.where(hard_N, 0.5, 0.95), 1.0, -1.0)
    speeches = [f"s{n}" for n in range(600)]
    knows_NH = margins_N[:, None] + np.where(hard_N, 0.9, 0.1)[:, None] * [1.0, -1.0]
    guesses_NH = margins_N[:, None] + rng.random(600)[:, None] * [1.0, -1.0]
    knows, guesses = (doubt(of_heads(heads), speeches)["tells_errors"]["spread"] for heads in (knows_NH, guesses_NH))
    assert knows["low"] > 0.6 and guesses["low"] < 0.5 < guesses["high"]
    groups = doubt(of_heads(knows_NH), speeches)["groups"]
    assert [g["n"] for g in groups] == [120] * 5 and groups[-1]["error"] > 0.4 > 0.1 > groups[0]["error"]


def test_where_nothing_is_wrong_nothing_is_told() -> None:
    told = doubt(of_heads(np.ones((3, 2))), ["a", "b", "c"])
    assert told["wrong"] == 0 and told["tells_errors"]["spread"] == {"value": None, "low": None, "high": None}


def test_all_is_told_at_once_and_nothing_without_pairs() -> None:
    found = held_out(of_heads(np.array([[1.0, 3.0], [-1.0, 0.0]])), [pair("a", 9, 5), pair("b", 5, 9)])
    assert found["metrics"]["accuracy"] == 0.5 and found["doubt"]["wrong"] == 1
    assert found["metrics"]["length_accuracy"] == 0.5 and sum(b["n"] for b in found["calibration"]) == 4
    own = held_out(of_heads(np.ones((2, 1))), [pair("a", 9, 5), pair("b", 5, 9)], np.array([2.0, -1.0]))
    assert (own["metrics"]["accuracy"], own["own_head"]["accuracy"]) == (1, 0.5) and "own_head" not in found
    assert held_out(of_heads(np.empty((0, 4))), []) == {"metrics": {}, "calibration": [], "strata": {}, "doubt": {}}
    with pytest.raises(ValueError, match="is nan"):
        held_out(of_heads(np.full((1, 2), np.nan)), [pair("a", 9, 5)])
