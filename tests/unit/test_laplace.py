"""Last-layer Laplace and the interface it shares with the ensemble, on cases worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from psyray.arrays import FloatArray
from psyray.reward.ensemble import fitted, prompt_matrix
from psyray.reward.heads import Heads
from psyray.reward.laplace import Laplace, fit_laplace, prior_laplace
from psyray.reward.posterior import PosteriorHeads
from psyray.sections.learning import HeadsSection


def made_pairs(n: int = 40, d: int = 5, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """(chosen, rejected) of a made-up linear taste, noisily followed."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n, d))
    first_N = rng.random(n) < expit((a - b) @ np.arange(d))
    return np.where(first_N[:, None], a, b), np.where(first_N[:, None], b, a)


def test_one_pair_by_hand() -> None:
    # The slope ridge * w - sigmoid(-w) is 0 at w = 1 for this ridge; the curvature is p (1 - p) + ridge.
    ridge = float(expit(-1))
    model = fit_laplace([[3.0]], [[2.0]], ridge=ridge)
    assert model.weights_D == pytest.approx([1.0])
    assert model.covariance_DD[0, 0] == pytest.approx(1 / (expit(1) * expit(-1) + ridge))
    belief = model.difference([[5.0], [0.0]], [[3.0], [0.0]])
    assert belief.mean_N == pytest.approx([2.0, 0.0])
    assert belief.spread_N == pytest.approx([2 / np.sqrt(expit(1) * expit(-1) + ridge), 0.0])


def test_the_mean_is_the_most_likely_head_and_the_covariance_the_inverse_curvature() -> None:
    chosen, rejected = made_pairs()
    x, prior = chosen - rejected, np.linspace(-1, 1, 5)
    model = fit_laplace(chosen, rejected, ridge=0.5, prior_D=prior)

    def slope(w: FloatArray) -> FloatArray:
        return np.asarray(0.5 * (w - prior) - expit(-(x @ w)) @ x)

    assert slope(model.weights_D) == pytest.approx(np.zeros(5), abs=1e-5)
    steps = 1e-5 * np.eye(5)
    curvature = np.stack([(slope(model.weights_D + s) - slope(model.weights_D - s)) / 2e-5 for s in steps])
    assert model.covariance_DD @ curvature == pytest.approx(np.eye(5), abs=1e-6)


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    chosen, rejected = made_pairs()
    early = fit_laplace(chosen[:10], rejected[:10], ridge=0.3)
    cold, warm = fit_laplace(chosen, rejected, ridge=0.3), fit_laplace(chosen, rejected, ridge=0.3, start=early)
    assert warm.weights_D == pytest.approx(cold.weights_D, abs=1e-6)
    assert warm.covariance_DD == pytest.approx(cold.covariance_DD, abs=1e-6)


def test_labels_narrow_what_is_thought_and_never_widen_it() -> None:
    chosen, rejected = made_pairs()
    before, after = prior_laplace(5, ridge=0.3), fit_laplace(chosen, rejected, ridge=0.3)
    assert (after.difference(chosen, rejected).spread_N < before.difference(chosen, rejected).spread_N).all()
    assert np.linalg.eigvalsh(before.covariance_DD - after.covariance_DD).min() > 0


def test_a_separable_set_with_hardly_any_ridge_settles() -> None:
    model = fit_laplace(np.eye(3) * 50, np.zeros((3, 3)), ridge=1e-6)
    assert np.isfinite(model.weights_D).all() and (model.weights_D > 0).all()


def test_draws_follow_the_posterior() -> None:
    chosen, rejected = made_pairs()
    model = fit_laplace(chosen, rejected, ridge=0.5, draws=4000, seed=1)
    weights_HD = model.heads.weights_HD
    assert weights_HD.mean(axis=0) == pytest.approx(model.weights_D)
    assert np.cov(weights_HD.T) == pytest.approx(model.covariance_DD, abs=0.15 * model.covariance_DD.max())
    assert model.scores(chosen).shape == (40, 4000)


@pytest.mark.parametrize("kind", ["ensemble", "laplace"])
def test_both_kinds_answer_a_difference_alike(kind: str) -> None:
    chosen, rejected = made_pairs()
    laplace = fit_laplace(chosen, rejected, ridge=0.5, draws=3000)
    model = laplace if kind == "laplace" else laplace.heads
    mean_N, spread_N = model.difference(chosen, rejected)
    turned = model.difference(rejected, chosen)
    assert turned.mean_N == pytest.approx(-mean_N)
    assert turned.spread_N == pytest.approx(spread_N)
    exact = laplace.difference(chosen, rejected)
    assert mean_N == pytest.approx(exact.mean_N, abs=1e-6)
    assert spread_N == pytest.approx(exact.spread_N, rel=0.1)


def test_an_ensembles_difference_by_hand() -> None:
    heads = Heads(np.array([[1.0, 0.0], [3.0, 0.0]]), np.zeros(2), np.ones(2))
    mean_N, spread_N = heads.difference([[2.0, 9.0]], [[1.0, 0.0]])
    assert (mean_N.tolist(), spread_N.tolist()) == ([2.0], [1.0])


@pytest.mark.parametrize("kind", ["ensemble", "laplace"])
def test_a_run_fits_the_kind_of_heads_that_it_names(kind: str) -> None:
    chosen, rejected = made_pairs(n=200)
    section = HeadsSection.model_validate({"kind": kind, "count": 6, "ridge": 1.0, "prior_spread": 0.0})
    heads = fitted(section, 10 * chosen, 10 * rejected, [str(n) for n in range(200)], np.full(5, 0.1), seed=0)
    assert heads.weights_HD.shape == (6, 5)
    assert (heads.difference(10 * chosen, 10 * rejected).mean_N > 0).mean() > 0.85
    alone = fitted(section, 10 * chosen[:1], 10 * rejected[:1], ["0"], np.full(5, 0.1), seed=0)
    spread = alone.weights_HD.std(axis=0).max()
    assert spread > 0.5 if kind == "laplace" else spread < 0.5  # one label: a bootstrap sees nothing to doubt


def test_the_heads_of_a_run_know_the_posterior_itself_also_after_a_file(tmp_path: Path) -> None:
    chosen, rejected = made_pairs(n=30)
    section = HeadsSection.model_validate({"kind": "laplace", "count": 4, "ridge": 1.0})
    fitted(section, chosen, rejected, [str(n) for n in range(30)], None, seed=0).save(tmp_path / "heads.npz")
    heads = Heads.load(tmp_path / "heads.npz")
    assert isinstance(heads, PosteriorHeads)
    exact = fit_laplace(chosen / heads.scale_D, rejected / heads.scale_D, ridge=1.0)
    belief, expected = (
        heads.difference(chosen, rejected),
        exact.difference(chosen / heads.scale_D, rejected / heads.scale_D),
    )
    assert belief.mean_N == pytest.approx(expected.mean_N) and belief.spread_N == pytest.approx(expected.spread_N)
    drawn = Heads.difference(heads, chosen, rejected)  # of four draws, in two opposite pairs
    assert np.abs(drawn.spread_N / expected.spread_N - 1).max() > 0.3
    one = heads.belief(chosen)
    about = (chosen - heads.mean_D) / heads.scale_D
    assert one.spread_N == pytest.approx(np.sqrt(np.einsum("nd,de,ne->n", about, exact.covariance_DD, about)))
    assert one.mean_N == pytest.approx(heads.scores(chosen).mean(axis=1))


def test_draws_that_were_kept_without_their_posterior_are_read_as_an_ensemble(tmp_path: Path) -> None:
    chosen, rejected = made_pairs()
    before = fit_laplace(chosen, rejected, ridge=0.5, draws=6).heads
    before.save(tmp_path / "heads.npz")
    again = Heads.load(tmp_path / "heads.npz")
    assert type(again) is Heads and (again.weights_HD == before.weights_HD).all()


def test_members_posteriors_are_a_mixture_whose_spread_many_draws_tell() -> None:
    rng = np.random.default_rng(0)
    roots, means = rng.normal(size=(2, 3, 3)), rng.normal(size=(2, 3))
    members = [
        PosteriorHeads(np.zeros((2, 3)), np.zeros(3), np.ones(3), mean[None], root[None])
        for mean, root in zip(means, roots, strict=True)
    ]
    belief = PosteriorHeads.joined(members).difference(first := rng.normal(size=(5, 6)), second := np.zeros((5, 6)))
    drawn = [
        (first - second)[:, 3 * m : 3 * m + 3] @ (means[m] + rng.normal(size=(100_000, 3)) @ roots[m].T).T
        for m in range(2)
    ]
    scores_NH = np.concatenate(drawn, axis=1)
    assert belief.mean_N == pytest.approx(scores_NH.mean(axis=1), abs=0.05)
    assert belief.spread_N == pytest.approx(scores_NH.std(axis=1), rel=0.02)


def test_where_speeches_lie() -> None:
    features = {"a": np.array([1.0, 0.0]), "b": np.array([3.0, 2.0])}
    rows = {"one": [{"response_id": "a"}, {"response_id": "b"}], "two": [{"response_id": "failed"}]}
    assert prompt_matrix(features, rows).tolist() == [[2.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("chosen", "ridge", "says"),
    [([[1.0]], 0.0, "ridge"), ([[np.nan]], 1.0, "pair 0"), (np.zeros((0, 2)), 1.0, "not \\(0, 2\\)")],
)
def test_what_cannot_be_fitted_is_refused(chosen: FloatArray, ridge: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit_laplace(chosen, np.zeros_like(chosen), ridge=ridge)


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, 2\]"):
        Laplace(np.zeros(2), np.eye(2)).difference([[1.0]], [[2.0]])
