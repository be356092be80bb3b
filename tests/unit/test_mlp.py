"""Heads with a hidden layer: what they see that a sum of features does not, and what holds them back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from psyray.reward.heads import Heads, fit_heads
from psyray.reward.mlp import MlpHeads, fit_mlp_heads

D = 8


def pairs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(chosen, rejected, speeches): the one nearer to the middle of the first two features wins, which no sum tells."""
    a, b = np.random.default_rng(seed).normal(size=(2, n, D))
    far = [(side[:, :2] ** 2).sum(axis=1) for side in (a, b)]
    a_wins = (far[0] < far[1])[:, None]
    return np.where(a_wins, a, b), np.where(a_wins, b, a), [f"s{i // 2}" for i in range(n)]


def accuracy(heads: Heads, n: int = 1000) -> float:
    chosen, rejected, _ = pairs(n, 99)
    return float((heads.difference(chosen, rejected).mean_N > 0).mean())


SETTINGS = {"count": 4, "ridge": 1.0, "seed": 0, "prior_spread": 0.05}


def test_they_learn_what_linear_heads_cannot():
    curved, linear = (fit(*pairs(600, 0), **SETTINGS) for fit in (fit_mlp_heads, fit_heads))
    assert accuracy(curved) > 0.85 and accuracy(linear) < 0.6


def test_they_are_unsure_where_they_saw_nothing():
    heads = fit_mlp_heads(*pairs(600, 0), **SETTINGS)
    near, far = np.random.default_rng(5).normal(size=(2, 200, D)), 6 * np.random.default_rng(5).normal(size=(2, 200, D))
    assert heads.difference(*far).spread_N.mean() > 1.5 * heads.difference(*near).spread_N.mean()


def test_a_heavy_ridge_leaves_the_prior():
    chosen, rejected, speeches = pairs(100, 0)
    prior = np.linspace(-1, 1, D)
    heavy = SETTINGS | {"ridge": 1e7, "prior_spread": 0.0}
    heads = fit_mlp_heads(chosen, rejected, speeches, prior_D=prior, **heavy)
    expected = Heads(np.stack([prior] * 4), heads.mean_D, heads.scale_D).scores(chosen)
    assert heads.scores(chosen) == pytest.approx(expected, abs=0.02)


def test_the_seed_decides_all_and_saved_heads_come_back(tmp_path: Path):
    data = pairs(60, 0)
    first, again = (fit_mlp_heads(*data, **SETTINGS) for _ in range(2))
    other = fit_mlp_heads(*data, **SETTINGS | {"seed": 1})
    assert (first.scores(data[0]) == again.scores(data[0])).all() and (
        first.scores(data[0]) != other.scores(data[0])
    ).any()
    first.save(tmp_path / "heads.npz")
    loaded = Heads.load(tmp_path / "heads.npz")
    assert isinstance(loaded, MlpHeads) and (loaded.scores(data[0]) == first.scores(data[0])).all()
    assert loaded.weights_HD.shape == (4, D)


def test_a_nan_feature_gives_nan_scores_and_bad_pairs_are_refused():
    chosen, rejected, speeches = pairs(20, 0)
    heads = fit_mlp_heads(chosen, rejected, speeches, **SETTINGS)
    chosen[0, 3] = np.nan
    scores = heads.scores(chosen)
    assert np.isnan(scores[0]).all() and np.isfinite(scores[1:]).all()
    with pytest.raises(ValueError, match="NaN or infinite feature"):
        fit_mlp_heads(chosen, rejected, speeches, **SETTINGS)


def test_a_thousand_pairs_of_a_small_model():
    chosen, rejected = np.random.default_rng(0).normal(size=(2, 1000, 576))
    heads = fit_mlp_heads(chosen, rejected, [str(i) for i in range(1000)], count=10, ridge=10.0, seed=0)
    assert heads.hidden_HRM.shape == (10, 96, 32)
