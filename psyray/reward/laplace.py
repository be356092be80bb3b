"""Last-layer Laplace: a Bayesian logistic regression on feature differences, for a reward that knows its doubt.

    model = fit_laplace(chosen_ND, rejected_ND, ridge=1.0)
    mean_N, spread_N = model.difference(first_ND, second_ND)
    model = fit_laplace(more_chosen_ND, more_rejected_ND, ridge=1.0, start=model)  # new labels: a few Newton steps

The posterior of the weights is taken as normal: its mean the most likely weights, its covariance the inverse
Hessian there (MacKay 1992; for last layers 2106.14806). D = 576 and 1,000 pairs take a fraction of a second.

Shapes: N pairs, D features, H draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.special import expit, log_expit

from psyray.arrays import FloatArray
from psyray.reward.heads import Heads
from psyray.reward.uncertainty import Belief

STEPS = 50  # Newton's method takes about 8


@dataclass(frozen=True)
class Laplace:
    """Weights ~ N(mean, covariance) on features as they are given; score = weights . feature."""

    weights_D: FloatArray
    covariance_DD: FloatArray
    draws: int = 20
    seed: int = 0

    def difference(self, first_ND: npt.ArrayLike, second_ND: npt.ArrayLike) -> Belief:
        """Mean and spread of score(first) - score(second) in logits; a NaN feature gives NaN."""
        x_ND = np.asarray(first_ND, dtype=np.float64) - np.asarray(second_ND, dtype=np.float64)
        if x_ND.ndim != 2 or x_ND.shape[1] != len(self.weights_D):
            raise ValueError(f"features must be [N, {len(self.weights_D)}], not of shape {x_ND.shape}")
        variance_N = np.einsum("nd,nd->n", x_ND @ self.covariance_DD, x_ND)
        return Belief(x_ND @ self.weights_D, np.sqrt(variance_N))

    def scores(self, features_ND: npt.ArrayLike) -> FloatArray:
        """[N, H] scores in logits under `draws` draws of the weights; a NaN feature gives NaN."""
        return self.heads.scores(features_ND)

    @cached_property
    def root_DD(self) -> FloatArray:
        """Lower triangular; root root' is the covariance."""
        return np.asarray(np.linalg.cholesky(self.covariance_DD))

    @cached_property
    def heads(self) -> Heads:
        """The draws as an ensemble, for all that reads one.

        Draws come in opposite pairs about the mean, so that with an even number their mean is the most likely
        head; the same seed draws the same directions whatever the labels, which keeps rounds comparable.
        """
        D = len(self.weights_D)
        half_HD = np.random.default_rng(self.seed).normal(size=((self.draws + 1) // 2, D))
        unit_HD = np.concatenate([half_HD, -half_HD])[: self.draws]
        weights_HD = self.weights_D + unit_HD @ self.root_DD.T
        return Heads(weights_HD, np.zeros(D), np.ones(D))


def prior_laplace(dimensions: int, *, ridge: float, draws: int = 20, seed: int = 0) -> Laplace:
    """What is thought before any label: every weight N(0, 1 / ridge)."""
    return Laplace(np.zeros(dimensions), np.eye(dimensions) / ridge, draws, seed)


def fit_laplace(
    chosen_ND: npt.ArrayLike,
    rejected_ND: npt.ArrayLike,
    *,
    ridge: float,
    prior_D: FloatArray | None = None,
    start: Laplace | None = None,
    draws: int = 20,
    seed: int = 0,
) -> Laplace:
    """The posterior of Bradley-Terry weights given pairs, under the prior N(`prior_D` or 0, 1 / ridge).

    The mean minimises sum_n log(1 + exp(-w . x_n)) + ridge / 2 |w - prior|^2 with x = chosen - rejected, by damped
    Newton steps from `start` (else from the prior); the covariance is (X' diag(p (1 - p)) X + ridge I)^-1 there.
    Raises ValueError for no pairs, unlike shapes, a NaN or infinite feature, a ridge not above 0.
    """
    x_ND = np.asarray(chosen_ND, dtype=np.float64) - np.asarray(rejected_ND, dtype=np.float64)
    if x_ND.ndim != 2 or 0 in x_ND.shape:
        raise ValueError(f"differences must be [pairs, features] with one of each at least, not {x_ND.shape}")
    if ridge <= 0:
        raise ValueError(f"ridge must be positive, not {ridge}")
    if not np.isfinite(x_ND).all():
        raise ValueError(f"pair {int((~np.isfinite(x_ND)).any(axis=1).argmax())} has a NaN or infinite feature")
    prior = np.zeros(x_ND.shape[1]) if prior_D is None else np.asarray(prior_D, dtype=np.float64)
    if prior.shape != (x_ND.shape[1],):
        raise ValueError(f"the prior must have {x_ND.shape[1]} weights, not shape {prior.shape}")
    weights_D = _most_likely(x_ND, prior, ridge, prior if start is None else start.weights_D)
    lower_DD = np.linalg.cholesky(_hessian(x_ND, weights_D, ridge))
    root_DD = solve_triangular(lower_DD, np.eye(len(lower_DD)), lower=True)
    return Laplace(weights_D, root_DD.T @ root_DD, draws, seed)


def _most_likely(x_ND: FloatArray, prior_D: FloatArray, ridge: float, weights_D: FloatArray) -> FloatArray:
    def loss(w_D: FloatArray) -> float:
        return float(-log_expit(x_ND @ w_D).sum() + ridge / 2 * ((w_D - prior_D) ** 2).sum())

    now = loss(weights_D)
    for _ in range(STEPS):
        slope_D = ridge * (weights_D - prior_D) - expit(-(x_ND @ weights_D)) @ x_ND
        step_D = cho_solve(cho_factor(_hessian(x_ND, weights_D, ridge)), slope_D)
        fall = float(slope_D @ step_D)  # twice the loss that is left, where the loss is nearly a parabola
        if fall <= 1e-12 * max(1.0, now):
            return weights_D
        length = 1.0
        while loss(weights_D - length * step_D) > now - 0.25 * length * fall and length > 1e-6:
            length /= 2
        weights_D = weights_D - length * step_D
        now = loss(weights_D)
    raise ValueError(f"the weights did not settle in {STEPS} Newton steps: give a larger ridge")


def _hessian(x_ND: FloatArray, weights_D: FloatArray, ridge: float) -> FloatArray:
    p_N = expit(x_ND @ weights_D)
    hessian_DD = (x_ND * (p_N * (1 - p_N))[:, None]).T @ x_ND
    hessian_DD[np.diag_indices_from(hessian_DD)] += ridge
    return np.asarray(hessian_DD)
