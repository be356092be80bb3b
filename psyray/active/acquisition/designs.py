"""Optimal design: the batch of pairs whose answers together pin the heads down best."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from psyray.active.acquisition.candidates import Candidates, Pick
from psyray.arrays import BoolArray, FloatArray

TIE = 1e-9  # mean scores closer than this are the same: rounding must not rank what nothing tells apart


def d_optimal(c: Candidates, n: int, rng: np.random.Generator) -> list[Pick]:
    """Greedy D-optimal design with logistic weights (2404.13895, 2502.04354).

    Asking about x = z_i - z_j adds w x x' to the Fisher information of the heads' weights, w = p (1 - p) with p =
    sigmoid(mean_i - mean_j). Each pick is the pair of the largest gain in log det of the posterior's precision,
    value = log(1 + w x' S x) in nats, with S the covariance given the picks before it: S <- S - w S x x' S /
    (1 + w x' S x), so that near-duplicates in a batch are worth little. z is `Candidates.embedding_PKE`: with
    features and covariance the paper's rule, with scores alone the same in the ensemble's own covariance. `first` has
    the higher mean; `rng` is not used.

    Gains only fall as picks are made, so a stale gain is an upper bound and only the prompts at the top are
    brought up to date (lazy greedy; the result is exact). O(P K^2 E) at first, then O(n K E) per prompt touched.
    """
    weight_PKK = expit(c.mean_PK[:, :, None] - c.mean_PK[:, None, :])
    return Greedy(c, weight_PKK * (1 - weight_PKK)).picks(n)


def v_optimal(c: Candidates, n: int, rng: np.random.Generator, share: float = 0.5) -> list[Pick]:
    """Greedy V-optimal design among contenders: what sharpens the predictions most, asked of replies that may win.

    value = sum over all pairs y of how far the answer about x narrows the variance of y's score difference: w |M' S
    x|^2 / (1 + w x' S x), with M M' = sum y y' and w, S, z as in `d_optimal`. That is the prediction-oriented gain
    of 2304.08151 in its linear normal form; unlike log det it does not chase odd replies that no prediction turns on.
    A pair is asked only if both responses are contenders, in the better `share` of their prompt by mean score (ties
    included), as long as there is one: there policy and reward model decide what to prefer (cf. the plausible
    winners of 2406.16745). Both together are ours. `first` has the higher mean; `rng` is not used. Values may rise
    from one pick to the next. O(P K E^2) at first, then O(P K E) per pick.
    """
    z_PKE = c.embedding_PKE
    p_PKK = expit(c.mean_PK[:, :, None] - c.mean_PK[:, None, :])
    weight_PKK, open_PKK = p_PKK * (1 - p_PKK), c.allowed_PKK.copy()
    strong_PK = contenders(c, share)
    strong_PKK = strong_PK[:, :, None] & strong_PK[:, None, :]
    moment_EE = pair_moment(z_PKE, c.present_PK)
    variance_PKK = squared_distances(z_PKE)
    square_E, axes_EE = np.linalg.eigh(moment_EE)  # of heads' deviations it has no full rank, for they sum to 0
    told_PKK = squared_distances(z_PKE @ (axes_EE * np.sqrt(np.maximum(square_E, 0.0))))
    falls_TE = np.zeros((min(n, len(z_PKE)), len(moment_EE)))  # S = I - falls' falls
    picks: list[Pick] = []
    while len(picks) < n and open_PKK.any():
        among_PKK = open_PKK & strong_PKK
        gain_PKK = weight_PKK * told_PKK / (1 + weight_PKK * variance_PKK)
        gain_PKK = np.where(among_PKK if among_PKK.any() else open_PKK, gain_PKK, -np.inf)
        p, i, j = np.unravel_index(int(gain_PKK.argmax()), gain_PKK.shape)
        turned = c.mean_PK[p, j] > c.mean_PK[p, i]
        picks.append(Pick(int(p), int(j if turned else i), int(i if turned else j), float(gain_PKK[p, i, j])))
        open_PKK[p] = False
        done_TE = falls_TE[: len(picks) - 1]
        x_E = z_PKE[p, i] - z_PKE[p, j]
        sx_E = x_E - done_TE.T @ (done_TE @ x_E)
        fall_E = sx_E * np.sqrt(weight_PKK[p, i, j] / (1 + weight_PKK[p, i, j] * max(float(x_E @ sx_E), 0.0)))
        mu_E = moment_EE @ fall_E
        moved_PK2 = z_PKE @ np.stack([fall_E, mu_E - done_TE.T @ (done_TE @ mu_E)], axis=1)
        t_PKK, q_PKK = np.moveaxis(moved_PK2[:, :, None] - moved_PK2[:, None], 3, 0)
        told_PKK = np.maximum(told_PKK - 2 * t_PKK * q_PKK + t_PKK**2 * float(fall_E @ mu_E), 0.0)
        variance_PKK = np.maximum(variance_PKK - t_PKK**2, 0.0)
        falls_TE[len(picks) - 1] = fall_E
    return picks


def contenders(c: Candidates, share: float) -> BoolArray:
    """[P, K]: the better `share` of a prompt's responses by mean score, two at least, with all that tie."""
    mean_PK = np.where(c.present_PK, c.mean_PK, -np.inf)
    kept_P = np.maximum(np.ceil(share * c.present_PK.sum(axis=1)).astype(int), 2)
    order_PK = -np.sort(-mean_PK, axis=1)
    least_P = order_PK[np.arange(len(mean_PK)), np.minimum(kept_P, mean_PK.shape[1]) - 1]
    return np.asarray(c.present_PK & (mean_PK >= least_P[:, None] - TIE))


def pair_moment(z_PKE: FloatArray, present_PK: BoolArray) -> FloatArray:
    """[E, E]: sum of y y' over all pairs y = z_i - z_j of responses present to one prompt; absent rows are 0."""
    count_P, sum_PE = present_PK.sum(axis=1), z_PKE.sum(axis=1)
    flat_NE = (z_PKE * np.sqrt(count_P)[:, None, None]).reshape(-1, z_PKE.shape[2])
    return np.asarray(flat_NE.T @ flat_NE - sum_PE.T @ sum_PE)


class Greedy:
    """The pairs' variances given the picks so far, brought up to date prompt by prompt."""

    def __init__(self, c: Candidates, weight_PKK: FloatArray) -> None:
        self.c, self.weight_PKK = c, weight_PKK
        self.variance_PKK = squared_distances(c.embedding_PKE)
        self.seen_P = np.zeros(len(weight_PKK), dtype=int)  # how many picks a prompt's variances know of
        self.falls_TE = np.zeros((0, c.embedding_PKE.shape[2]))  # S = I - falls' falls

    def picks(self, n: int) -> list[Pick]:
        """The first `n` of the greedy order, one a prompt."""
        gain_PKK = np.where(self.c.allowed_PKK, np.log1p(self.weight_PKK * self.variance_PKK), -np.inf)
        bound_P = gain_PKK.max(axis=(1, 2), initial=-np.inf)
        self.falls_TE = np.zeros((min(n, len(bound_P)), self.falls_TE.shape[1]))
        found: list[Pick] = []
        while len(found) < n and len(bound_P):
            p = int(bound_P.argmax())
            if bound_P[p] == -np.inf:
                break
            if self.seen_P[p] < len(found):
                gain_PKK[p] = self._gain(p, len(found), self.c.allowed_PKK[p])
                bound_P[p] = gain_PKK[p].max()
                continue
            found.append(self._take(p, gain_PKK[p], len(found)))
            bound_P[p] = -np.inf
        return found

    def _gain(self, p: int, t: int, allowed_KK: BoolArray) -> FloatArray:
        moved_KT = self.c.embedding_PKE[p] @ self.falls_TE[self.seen_P[p] : t].T
        self.variance_PKK[p] -= ((moved_KT[:, None] - moved_KT[None]) ** 2).sum(axis=2)
        self.seen_P[p] = t
        variance_KK = np.maximum(self.variance_PKK[p], 0.0)  # rounding
        return np.where(allowed_KK, np.log1p(self.weight_PKK[p] * variance_KK), -np.inf)

    def _take(self, p: int, gain_KK: FloatArray, t: int) -> Pick:
        i, j = divmod(int(gain_KK.argmax()), gain_KK.shape[1])
        if self.c.mean_PK[p, j] > self.c.mean_PK[p, i]:
            i, j = j, i
        x_E = self.c.embedding_PKE[p, i] - self.c.embedding_PKE[p, j]
        sx_E = x_E - self.falls_TE[:t].T @ (self.falls_TE[:t] @ x_E)
        weight = self.weight_PKK[p, i, j]
        self.falls_TE[t] = sx_E * np.sqrt(weight / (1 + weight * max(float(x_E @ sx_E), 0.0)))
        return Pick(p, i, j, float(gain_KK.max()))


def squared_distances(z_PKE: FloatArray) -> FloatArray:
    """[P, K, K]: |z_i - z_j|^2, exactly 0 and symmetric where i = j; by Gram matrices, which need no P*K*K*E."""
    gram_PKK = z_PKE @ z_PKE.transpose(0, 2, 1)
    square_PK = np.einsum("pkk->pk", gram_PKK)
    return np.asarray(np.maximum(square_PK[:, :, None] + square_PK[:, None, :] - 2 * gram_PKK, 0.0))
