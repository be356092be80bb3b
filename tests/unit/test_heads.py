"""Ensemble heads: what they learn, what the prior and the bootstrap do, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from psyray.arrays import FloatArray
from psyray.reward.heads import Heads, fit_heads, standardisation

Pairs = tuple[FloatArray, FloatArray, FloatArray, list[str]]


def pairs(n: int, d: int, seed: int = 0, noise: float = 0.3) -> Pairs:
    """(chosen, rejected, true weights, speeches): chosen mostly scores higher under the true weights."""
    rng = np.random.default_rng(seed)
    true_D = rng.normal(size=d)
    a, b = rng.normal(loc=3, scale=2, size=(2, n, d))
    a_wins = (a - b) @ true_D + noise * rng.logistic(size=n) > 0
    chosen, rejected = np.where(a_wins[:, None], a, b), np.where(a_wins[:, None], b, a)
    return chosen, rejected, true_D, [f"s{i // 2}" for i in range(n)]


def test_one_pair_solves_the_equation_that_a_pencil_gives() -> None:
    # Features 1 and -1: mean 0, scale 1, difference 2. The minimum has ridge * w = 2 * sigmoid(-2 w).
    heads = fit_heads([[1.0]], [[-1.0]], ["s"], count=2, ridge=0.5, seed=0)
    w = heads.weights_HD[0, 0]
    assert (heads.mean_D[0], heads.scale_D[0]) == (0.0, 1.0)
    assert 0.5 * w == pytest.approx(2 * expit(-2 * w), abs=1e-6)
    assert heads.scores([[1.0], [0.0]])[:, 1] == pytest.approx([w, 0.0])


@pytest.mark.parametrize(("n", "d"), [(60, 5), (12, 40)])
def test_every_head_is_at_the_minimum_of_its_bootstrap(n: int, d: int) -> None:
    """The gradient is zero for some draw of whole speeches, with more pairs than features and with fewer."""
    chosen, rejected, _, speeches = pairs(n, d)
    prior = np.linspace(-0.5, 0.5, d)
    heads = fit_heads(chosen, rejected, speeches, count=3, ridge=0.7, seed=4, prior_D=prior)
    counts = np.random.default_rng(4).multinomial(n // 2, np.full(n // 2, 2 / n), size=3)
    _, speech_N = np.unique(speeches, return_inverse=True)
    x_ND = (chosen - rejected) / heads.scale_D
    for w_D, times_S in zip(heads.weights_HD, counts, strict=True):
        pull_N = times_S[speech_N] * expit(-x_ND @ w_D)
        assert 0.7 * (w_D - prior) == pytest.approx(pull_N @ x_ND, abs=1e-4)


def test_heads_rank_new_pairs_and_disagree_more_with_fewer_labels() -> None:
    chosen, rejected, true_D, speeches = pairs(400, 10)
    new = np.random.default_rng(9).normal(loc=3, scale=2, size=(500, 10))
    many = fit_heads(chosen, rejected, speeches, count=8, ridge=1.0, seed=0).scores(new)
    few = fit_heads(chosen[:40], rejected[:40], speeches[:40], count=8, ridge=1.0, seed=0).scores(new)
    truth = new @ true_D
    agreement = [np.corrcoef(scores.mean(axis=1), truth)[0, 1] for scores in (many, few)]
    assert agreement[0] > 0.98 and agreement[0] > agreement[1]
    relative = [(s.std(axis=1) / s.mean(axis=1).std()).mean() for s in (many, few)]
    assert relative[0] < relative[1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 999), st.floats(0.1, 10))
def test_swapping_chosen_and_rejected_negates_the_weights(n: int, d: int, seed: int, ridge: float) -> None:
    chosen, rejected, _, speeches = pairs(n, d, seed)
    here = fit_heads(chosen, rejected, speeches, count=3, ridge=ridge, seed=seed)
    there = fit_heads(rejected, chosen, speeches, count=3, ridge=ridge, seed=seed)
    assert there.weights_HD == pytest.approx(-here.weights_HD, abs=1e-5)
    assert (there.mean_D == here.mean_D).all() and (there.scale_D == here.scale_D).all()


def test_a_heavy_ridge_leaves_the_prior_and_a_light_one_the_data() -> None:
    chosen, rejected, true_D, speeches = pairs(200, 4)
    wrong = -true_D
    heavy = fit_heads(chosen, rejected, speeches, count=2, ridge=1e9, seed=0, prior_D=wrong).weights_HD
    light = fit_heads(chosen, rejected, speeches, count=2, ridge=1e-2, seed=0, prior_D=wrong).weights_HD
    assert heavy == pytest.approx(np.stack([wrong, wrong]), abs=1e-4)
    assert (np.sign(light) == np.sign(true_D)).all()


def test_a_raw_reward_head_becomes_a_prior_through_the_scale() -> None:
    chosen, rejected, raw_D, speeches = pairs(50, 6)
    prior = raw_D * standardisation(chosen, rejected)[1]
    scores = fit_heads(chosen, rejected, speeches, count=1, ridge=1e9, seed=0, prior_D=prior).scores(chosen)[:, 0]
    raw = chosen @ raw_D
    assert scores - scores.mean() == pytest.approx(raw - raw.mean(), abs=1e-4)


def test_where_no_pair_looks_only_a_spread_of_priors_makes_heads_differ() -> None:
    chosen, rejected = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[0.0, 0.0], [0.5, 0.0]])
    args = (chosen, rejected, ["s", "t"])
    assert (fit_heads(*args, count=50, ridge=1.0, seed=0).weights_HD[:, 1] == 0).all()
    spread = fit_heads(*args, count=50, ridge=1.0, seed=0, prior_spread=2.0).weights_HD[:, 1]
    assert spread.std() == pytest.approx(2.0, rel=0.3)


def test_pairs_of_one_speech_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=(2, 20, 3))
    one = fit_heads(chosen, rejected, ["s"] * 20, count=4, ridge=1.0, seed=0).weights_HD
    own = fit_heads(chosen, rejected, [f"s{i}" for i in range(20)], count=4, ridge=1.0, seed=0).weights_HD
    assert np.ptp(one, axis=0).max() < 1e-9  # one cluster: every bootstrap is the data itself
    assert np.ptp(own, axis=0).min() > 1e-3


def test_the_seed_decides_all() -> None:
    chosen, rejected, _, speeches = pairs(30, 4)
    first, again, other = (fit_heads(chosen, rejected, speeches, count=3, ridge=1.0, seed=s) for s in (1, 1, 2))
    assert (first.weights_HD == again.weights_HD).all()
    assert (first.weights_HD != other.weights_HD).any()


def test_a_constant_feature_harms_nothing() -> None:
    chosen, rejected, _, speeches = pairs(30, 4)
    chosen[:, 2] = rejected[:, 2] = 0.1
    heads = fit_heads(chosen, rejected, speeches, count=3, ridge=1.0, seed=0)
    assert heads.scale_D[2] == 1.0
    assert heads.weights_HD[:, 2] == pytest.approx(0.0, abs=1e-9)


def test_saved_heads_come_back_and_leave_no_stray_file(tmp_path: Path) -> None:
    chosen, rejected, _, speeches = pairs(30, 4)
    heads = fit_heads(chosen, rejected, speeches, count=3, ridge=1.0, seed=0)
    path = tmp_path / "round" / "heads.npz"
    heads.save(path)
    heads.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["heads.npz"]
    assert (Heads.load(path).scores(chosen) == heads.scores(chosen)).all()


def test_other_accounts_may_read_saved_heads(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    Heads(np.ones((2, 2)), np.zeros(2), np.ones(2)).save(tmp_path / "heads.npz")
    assert (tmp_path / "heads.npz").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_heads_that_cannot_be_written_leave_the_old_ones_and_no_stray_file(tmp_path: Path) -> None:
    path = tmp_path / "heads.npz"
    Heads(np.ones((2, 2)), np.zeros(2), np.ones(2)).save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Object arrays"):
        Heads(np.array([{}]), np.zeros(2), np.ones(2)).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["heads.npz"]


def test_a_nan_feature_gives_nan_scores_and_another_width_an_error() -> None:
    heads = Heads(np.ones((2, 2)), np.zeros(2), np.ones(2))
    assert np.isnan(heads.scores([[1.0, np.nan], [1.0, 2.0]])).tolist() == [[True, True], [False, False]]
    with pytest.raises(ValueError, match=r"\[N, 2\], not of shape \(1, 3\)"):
        heads.scores([[1.0, 2.0, 3.0]])


GOOD = np.arange(6.0).reshape(3, 2)
BAD = np.array([[0.0, 1.0], [2.0, np.nan], [np.inf, 0.0]])


@pytest.mark.parametrize(
    ("chosen", "rejected", "speeches", "said"),
    [
        (GOOD, -GOOD[:2], ["a", "b", "c"], "do not match"),
        (GOOD, -GOOD, ["a", "b"], "2 speeches do not match"),
        (GOOD[:0], GOOD[:0], [], "no pairs"),
        (GOOD, BAD, ["a", "b", "c"], r"rejected row 1 \(speech b\) has a NaN or infinite feature, one of 2"),
    ],
)
def test_what_cannot_be_fitted_is_named(
    chosen: FloatArray, rejected: FloatArray, speeches: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        fit_heads(chosen, rejected, speeches, count=2, ridge=1.0, seed=0)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="positive, not 0"):
        fit_heads(GOOD, -GOOD, ["a", "b", "c"], count=0, ridge=1.0, seed=0)
    with pytest.raises(ValueError, match=r"positive, not 1 and 0\.0"):
        fit_heads(GOOD, -GOOD, ["a", "b", "c"], count=1, ridge=0.0, seed=0)
    with pytest.raises(ValueError, match="prior must have 2 weights"):
        fit_heads(GOOD, -GOOD, ["a", "b", "c"], count=1, ridge=1.0, seed=0, prior_D=np.zeros(3))


def test_four_heads_on_two_thousand_pairs() -> None:
    chosen, rejected, _, speeches = pairs(2000, 576, noise=5.0)
    heads = fit_heads(chosen, rejected, speeches, count=4, ridge=1.0, seed=0)
    assert heads.weights_HD.shape == (4, 576)
