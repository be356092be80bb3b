"""Rating heads: what they learn, what they say of themselves, and where there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from psyray.reward.ratings import RIDGES, RatingHeads, fit_rated, fit_ratings, rated
from psyray.rubric import load_rubric

RUBRIC = load_rubric("counselling")
P, D = len(RUBRIC.keys), 6
TRUE_PD = np.random.default_rng(1).normal(size=(P, D))


def responses(n: int, seed: int, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(features, ratings, speeches): ratings are 3 and a sum of the features; the last feature never varies."""
    rng = np.random.default_rng(seed)
    features = rng.normal(loc=5, scale=2, size=(n, D))
    features[:, -1] = 7
    ratings = 3 + 0.2 * (features - 5) @ (TRUE_PD * (np.arange(D) < D - 1)).T
    return features, ratings + noise * rng.normal(size=(n, P)), [f"s{i // 2}" for i in range(n)]


def test_they_find_the_principles_and_tell_how_well_on_new_responses():
    heads = fit_ratings(*responses(200, 0), RUBRIC)
    features, ratings, _ = responses(100, 9)
    found = heads.held_out(features, ratings)
    assert list(found) == [*RUBRIC.keys, "score"]
    assert all(fit["r2"] > 0.9 and fit["spearman"] > 0.9 for fit in found.values())
    said = heads.explain(features[0])
    assert list(said) == RUBRIC.keys and list(said.values()) == pytest.approx(ratings[0], abs=0.5)
    assert heads.explain([*features[0][:-1], 99.0]) == pytest.approx(said)  # what never varied has no weight


def test_where_features_say_nothing_the_mean_is_said_and_r2_is_none_to_speak_of():
    features, ratings, speeches = responses(200, 0)
    shuffled = np.random.default_rng(0).permutation(ratings)
    heads = fit_ratings(features, shuffled, speeches, RUBRIC)
    assert heads.ridge >= 100 and heads.predict(features).mean(axis=0) == pytest.approx(shuffled.mean(axis=0))
    assert all(abs(fit["r2"]) < 0.3 for fit in heads.held_out(*responses(100, 9)[:2]).values())


def test_the_score_weighs_as_the_rubric_does():
    heads = fit_ratings(*responses(60, 0), RUBRIC)
    features, ratings, _ = responses(50, 3)
    predicted = [RUBRIC.score(heads.explain(row)) for row in features]
    truth = [RUBRIC.score(dict(zip(RUBRIC.keys, row, strict=True))) for row in ratings]
    expected = 1 - np.var(np.subtract(predicted, truth)) / np.var(truth)
    assert heads.held_out(features, ratings)["score"]["r2"] == pytest.approx(expected, abs=0.01)


def test_ratings_that_do_not_vary_have_no_correlation():
    features, ratings, speeches = responses(40, 0)
    ratings[:, 0] = 5
    found = fit_ratings(features, ratings, speeches, RUBRIC).held_out(features, ratings)
    assert found[RUBRIC.keys[0]] == {"r2": None, "spearman": None} and found[RUBRIC.keys[1]]["r2"] > 0.9


def test_saved_heads_come_back(tmp_path: Path):
    heads = fit_ratings(*responses(40, 0), RUBRIC)
    heads.save(tmp_path / "ratings.npz")
    again = RatingHeads.load(tmp_path / "ratings.npz")
    features = responses(5, 2)[0]
    assert again.keys == tuple(RUBRIC.keys) and again.ridge in RIDGES
    assert (again.predict(features) == heads.predict(features)).all()


def pair(number: int, split: str, **ratings: object) -> dict:
    given = {"chosen_ratings": dict.fromkeys(RUBRIC.keys, 4.0), "rejected_ratings": dict.fromkeys(RUBRIC.keys, 2.0)}
    ids = {"chosen_id": f"{number}a", "rejected_id": f"{number}b"}
    return {"speech_id": f"s{number}", "split": split, **ids, **given, **ratings}


def test_only_what_was_rated_by_every_principle_and_has_features_is_learned_from():
    features = {f"{n}{side}": np.full(D, n + (side == "a")) for n in range(5) for side in "ab"}
    rows = [
        pair(0, "train"),
        pair(1, "train", chosen_ratings=None),
        pair(2, "train", rejected_ratings={RUBRIC.keys[0]: 1.0}),
        pair(3, "test"),
        pair(4, "train", chosen_ratings=dict.fromkeys(RUBRIC.keys, 4.0) | {RUBRIC.keys[1]: float("nan")}),
        pair(9, "train"),  # no features
    ]
    assert sorted(rated(rows, features, RUBRIC.keys)) == ["0a", "0b", "1b", "2a", "3a", "3b", "4b"]
    heads, stats = fit_rated(rows, features, RUBRIC)
    assert heads is not None and (stats["train"], stats["test"]) == (5, 2)
    assert stats["held_out"]["score"]["spearman"] == pytest.approx(1)


@pytest.mark.parametrize("rows", [[], [pair(0, "train")], [pair(0, "train"), pair(1, "test")]])
def test_one_speech_is_too_few(rows):
    features = {f"{n}{side}": np.zeros(D) for n in range(2) for side in "ab"}
    heads, stats = fit_rated(rows, features, RUBRIC)
    assert heads is None and "held_out" not in stats
